//! What the runtime asks, read from the environment: the one place that knows
//! which variables a command needs and what they may hold. Pure.

use std::fmt;

use serde_json::{Value, json};

/// The command, as the specification names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Add,
    Del,
    Check,
    Status,
    Gc,
    Version,
}

impl Command {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "ADD" => Self::Add,
            "DEL" => Self::Del,
            "CHECK" => Self::Check,
            "STATUS" => Self::Status,
            "GC" => Self::Gc,
            "VERSION" => Self::Version,
            _ => return None,
        })
    }

    /// Variables it cannot do without. (The specification wants CNI_PATH for GC,
    /// for plugins that call others; this one calls none.)
    fn needs(self) -> &'static [Variable] {
        use Variable::{ContainerId, Ifname, Netns};
        match self {
            Self::Add | Self::Check => &[ContainerId, Netns, Ifname],
            // The namespace may be gone by then.
            Self::Del => &[ContainerId, Ifname],
            Self::Status | Self::Gc | Self::Version => &[],
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Status => "STATUS",
            Self::Gc => "GC",
            Self::Version => "VERSION",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variable {
    ContainerId,
    Netns,
    Ifname,
}

impl Variable {
    fn name(self) -> &'static str {
        match self {
            Self::ContainerId => "CNI_CONTAINERID",
            Self::Netns => "CNI_NETNS",
            Self::Ifname => "CNI_IFNAME",
        }
    }

    fn check(self, value: &str) -> Result<(), &'static str> {
        let well_formed = match self {
            Self::ContainerId => {
                value.starts_with(|c: char| c.is_ascii_alphanumeric())
                    && value
                        .bytes()
                        .all(|c| c.is_ascii_alphanumeric() || b"_.-".contains(&c))
            }
            Self::Netns => value.starts_with('/'),
            Self::Ifname => {
                (1..16).contains(&value.len())
                    && ![".", ".."].contains(&value)
                    && !value.contains(|c: char| "/:".contains(c) || c.is_whitespace())
            }
        };
        if well_formed {
            return Ok(());
        }
        Err(match self {
            Self::ContainerId => "must be of letters, digits, '_', '.' and '-', a letter or digit first",
            Self::Netns => "must be an absolute path",
            Self::Ifname => "must be a device's name of at most 15 characters",
        })
    }
}

/// A variable that is not there, or holds what it may not.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable} {problem}")]
pub(crate) struct InvalidEnvironment {
    variable: &'static str,
    problem: String,
}

/// A call whose variables are all there.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) command: Command,
    container_id: String,
    netns: String,
    ifname: String,
    args: String,
}

impl Call {
    /// `variable` gives None for what is not set, or is no text.
    pub(crate) fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, InvalidEnvironment> {
        let refuse = |variable, problem: &str| InvalidEnvironment {
            variable,
            problem: problem.to_owned(),
        };
        let command = variable("CNI_COMMAND").filter(|name| !name.is_empty());
        let command = command.ok_or_else(|| refuse("CNI_COMMAND", "is required"))?;
        let command = Command::parse(&command)
            .ok_or_else(|| refuse("CNI_COMMAND", &format!("{command:?} is unknown")))?;
        let get = |of: Variable| variable(of.name()).unwrap_or_default();
        for &needed in command.needs() {
            let value = get(needed);
            if value.is_empty() {
                return Err(refuse(needed.name(), &format!("is required for {command}")));
            }
            needed
                .check(&value)
                .map_err(|problem| refuse(needed.name(), &format!("{value:?}: {problem}")))?;
        }
        Ok(Self {
            command,
            container_id: get(Variable::ContainerId),
            netns: get(Variable::Netns),
            ifname: get(Variable::Ifname),
            args: variable("CNI_ARGS").unwrap_or_default(),
        })
    }

    /// As the agent is asked.
    pub(crate) fn request(&self, config: &Value) -> Value {
        json!({
            "command": self.command.to_string(),
            "container_id": self.container_id,
            "netns": self.netns,
            "ifname": self.ifname,
            "args": self.args,
            "config": config,
        })
    }
}

//! What runs of an instance, for a person to read.

use std::{fmt, time::Duration};

use crate::{
    component::Component,
    instance::{InstanceName, Layout},
    process::Process,
};

/// One instance, as it is right now.
#[derive(Clone, Debug)]
pub struct Status {
    layout: Layout,
    components: Vec<(String, Option<Process>)>,
    others: Vec<InstanceName>,
}

impl Status {
    pub fn of(instance: &InstanceName) -> Self {
        let layout = Layout::new(instance.clone());
        let mut others = Layout::existing();
        others.retain(|other| other != instance);
        let components = Component::all(&layout)
            .into_iter()
            .map(|component| {
                let process = component.process(&layout);
                (component.name, process)
            })
            .collect();
        Self {
            layout,
            components,
            others,
        }
    }

    pub fn exists(&self) -> bool {
        !self.components.is_empty()
    }

    /// Whether everything that was started runs.
    pub fn whole(&self) -> bool {
        self.exists() && self.components.iter().all(|(_, process)| process.is_some())
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.layout.instance();
        if self.exists() {
            writeln!(
                f,
                "{:<26} {:<8} {:>8} {:>8} {:>8}",
                "COMPONENT", "STATE", "PID", "AGE", "MEMORY"
            )?;
            for (component, process) in &self.components {
                match process {
                    Some(process) => {
                        let age = process.age().map(short).unwrap_or_default();
                        let memory = process
                            .resident()
                            .map(|bytes| format!("{} MB", bytes / 1_000_000));
                        let memory = memory.unwrap_or_default();
                        writeln!(
                            f,
                            "{component:<26} {:<8} {:>8} {age:>8} {memory:>8}",
                            "runs",
                            process.pid()
                        )?;
                    }
                    None => writeln!(f, "{component:<26} {:<8}", "stopped")?,
                }
            }
            writeln!(f, "\nlogs        {}", self.layout.logs().display())?;
            writeln!(f, "kubeconfig  {}", self.layout.kubeconfig().display())?;
        } else {
            writeln!(f, "There is no instance {name}. deploy/local/up makes it.")?;
        }
        if !self.others.is_empty() {
            let others: Vec<&str> = self.others.iter().map(InstanceName::as_str).collect();
            writeln!(f, "other instances: {}", others.join(", "))?;
        }
        Ok(())
    }
}

fn short(age: Duration) -> String {
    match age.as_secs() {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7200 => format!("{}m", seconds / 60),
        seconds => format!("{}h", seconds / 3600),
    }
}

use std::fmt;

/// A value that was refused: which field, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Invalid {
    /// Path of the field in the message, e.g. `containers[0].name`.
    pub field: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl Invalid {
    pub fn new(field: impl Into<String>, problem: impl fmt::Display) -> Self {
        Self {
            field: field.into(),
            problem: problem.to_string(),
        }
    }

    pub(crate) fn missing(field: impl Into<String>) -> Self {
        Self::new(field, "is required")
    }

    /// The same refusal, seen from the message that holds this one in `parent`.
    pub fn within(self, parent: impl fmt::Display) -> Self {
        Self {
            field: format!("{parent}.{}", self.field),
            problem: self.problem,
        }
    }
}

impl From<Invalid> for tonic::Status {
    fn from(invalid: Invalid) -> Self {
        Self::invalid_argument(invalid.to_string())
    }
}

/// Parses each element of a repeated field; a refusal names the index.
pub(crate) fn each<T, U>(
    field: &str,
    values: Vec<T>,
    parse: impl Fn(T) -> Result<U, Invalid>,
) -> Result<Vec<U>, Invalid> {
    values
        .into_iter()
        .enumerate()
        .map(|(i, value)| parse(value).map_err(|e| e.within(format_args!("{field}[{i}]"))))
        .collect()
}

/// A message field that has to be there.
pub(crate) fn required<T>(field: &str, value: Option<T>) -> Result<T, Invalid> {
    value.ok_or_else(|| Invalid::missing(field))
}

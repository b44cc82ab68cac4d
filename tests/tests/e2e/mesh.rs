use super::suite::Case;
pub(crate) fn tests() -> Vec<Case> {
    vec![]
}

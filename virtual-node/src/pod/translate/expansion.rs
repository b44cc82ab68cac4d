//! `$(NAME)` in env values, commands, arguments and sub-paths.
//!
//! Kubernetes' rules: `$$` is a dollar, a name nobody defined stays as it was
//! written, an unclosed `$(` is text.

use pool_agent_api::spec::{Segment, Text};

/// Joins literals as it goes, so that a text without holes is one segment.
#[derive(Default)]
pub(super) struct TextBuilder(Vec<Segment>);

impl TextBuilder {
    pub(super) fn push_str(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        if let Some(Segment::Literal(last)) = self.0.last_mut() {
            last.push_str(text);
        } else {
            self.0.push(Segment::Literal(text.to_owned()));
        }
    }

    pub(super) fn push_text(&mut self, text: &Text) {
        for segment in &text.0 {
            match segment {
                Segment::Literal(literal) => self.push_str(literal),
                Segment::Field(field) => self.0.push(Segment::Field(*field)),
            }
        }
    }

    pub(super) fn finish(self) -> Text {
        Text(self.0)
    }
}

/// `input` with each `$(NAME)` replaced that `lookup` knows.
pub(super) fn expand<'a>(input: &str, lookup: impl Fn(&str) -> Option<&'a Text>) -> Text {
    let mut out = TextBuilder::default();
    let mut rest = input;
    while let Some(dollar) = rest.find('$') {
        out.push_str(&rest[..dollar]);
        let after = &rest[dollar + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push_str("$");
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|body| body.split_once(')')) {
            match lookup(name) {
                Some(text) => out.push_text(text),
                None => out.push_str(&rest[dollar..dollar + name.len() + 3]),
            }
            rest = tail;
        } else {
            out.push_str("$");
            rest = after;
        }
    }
    out.push_str(rest);
    out.finish()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use pool_agent_api::spec::HostField;
    use proptest::prelude::*;

    use super::*;

    fn expanded(input: &str) -> Text {
        let known = HashMap::from([
            ("A", Text::from("a")),
            ("EMPTY", Text::default()),
            ("DOLLAR", Text::from("$(A)")),
            ("IP", Text(vec![Segment::Field(HostField::PodIp)])),
        ]);
        expand(input, |name| known.get(name))
    }

    #[test]
    fn names_are_replaced_by_kubernetes_rules() {
        for (input, expected) in [
            ("", ""),
            ("plain", "plain"),
            ("$(A)", "a"),
            ("x$(A)y$(A)z", "xayaz"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$a"),
            ("$(UNKNOWN)", "$(UNKNOWN)"),
            ("$(A", "$(A"),
            ("$A", "$A"),
            ("$", "$"),
            ("$$", "$"),
            ("$()", "$()"),
            ("[$(EMPTY)]", "[]"),
            // What a value brings in is not expanded again.
            ("$(DOLLAR)", "$(A)"),
            ("ü$(A)ü", "üaü"),
        ] {
            let literal = if expected.is_empty() {
                Text::default()
            } else {
                Text::from(expected)
            };
            assert_eq!(expanded(input), literal, "{input}");
        }
    }

    #[test]
    fn a_hole_stays_a_hole() {
        assert_eq!(
            expanded("http://$(IP):80"),
            Text(vec![
                Segment::Literal("http://".into()),
                Segment::Field(HostField::PodIp),
                Segment::Literal(":80".into()),
            ])
        );
    }

    proptest! {
        #[test]
        fn text_without_a_dollar_is_unchanged(input in "[^$]{1,40}") {
            prop_assert_eq!(expanded(&input), Text::from(input.as_str()));
        }

        #[test]
        fn no_input_panics(input in ".{0,40}|[$()A]{0,12}") {
            expanded(&input);
        }
    }
}

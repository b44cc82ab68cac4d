//! A text with holes for what is known only on the host: an env value or an
//! argument that names the pod's own address.

use std::net::IpAddr;

use crate::{Invalid, wire};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Text(pub Vec<Segment>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    Literal(String),
    Field(HostField),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostField {
    PodIp,
    /// Comma-separated.
    PodIps,
    HostIp,
    /// Comma-separated.
    HostIps,
}

impl Text {
    pub fn literal(text: impl Into<String>) -> Self {
        Self(vec![Segment::Literal(text.into())])
    }

    /// The text with its holes filled.
    pub fn render(&self, pod: IpAddr, host: IpAddr) -> String {
        self.0
            .iter()
            .map(|segment| match segment {
                Segment::Literal(text) => text.clone(),
                Segment::Field(HostField::PodIp | HostField::PodIps) => pod.to_string(),
                Segment::Field(HostField::HostIp | HostField::HostIps) => host.to_string(),
            })
            .collect()
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self::literal(text)
    }
}

impl TryFrom<wire::Text> for Text {
    type Error = Invalid;

    fn try_from(text: wire::Text) -> Result<Self, Invalid> {
        crate::invalid::each("segments", text.segments, |segment| {
            use wire::{HostField as W, segment::Part};
            match crate::invalid::required("part", segment.part)? {
                Part::Literal(text) => Ok(Segment::Literal(text)),
                Part::Field(field) => Ok(Segment::Field(match W::try_from(field) {
                    Ok(W::PodIp) => HostField::PodIp,
                    Ok(W::PodIps) => HostField::PodIps,
                    Ok(W::HostIp) => HostField::HostIp,
                    Ok(W::HostIps) => HostField::HostIps,
                    Ok(W::Unspecified) | Err(_) => {
                        return Err(Invalid::new(
                            "field",
                            format_args!("{field} is not a known host field"),
                        ));
                    }
                })),
            }
        })
        .map(Self)
    }
}

impl From<Text> for wire::Text {
    fn from(text: Text) -> Self {
        use wire::{HostField as W, segment::Part};
        let part = |segment| match segment {
            Segment::Literal(text) => Part::Literal(text),
            Segment::Field(field) => Part::Field(
                match field {
                    HostField::PodIp => W::PodIp,
                    HostField::PodIps => W::PodIps,
                    HostField::HostIp => W::HostIp,
                    HostField::HostIps => W::HostIps,
                }
                .into(),
            ),
        };
        Self {
            segments: text
                .0
                .into_iter()
                .map(|s| wire::Segment { part: Some(part(s)) })
                .collect(),
        }
    }
}

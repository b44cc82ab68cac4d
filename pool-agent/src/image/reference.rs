//! Image references, as far as an agent has to read them: whether one is well
//! formed, and which registry's credentials fit it. Pure.

use pool_agent_api::spec::RegistryCredential;

/// A reference that no registry can be asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("couldn't parse image name {name:?}: {problem}")]
pub struct InvalidImage {
    pub name: String,
    pub problem: &'static str,
}

/// `registry/path[:tag][@digest]`, with Docker's defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// `host[:port]`.
    pub registry: String,
    pub path: String,
    pub tag: Option<String>,
    pub digest: Option<String>,
}

/// Docker's own registry, when none is named.
const DEFAULT_REGISTRY: &str = "docker.io";

impl Reference {
    pub fn parse(name: &str) -> Result<Self, InvalidImage> {
        let refuse = |problem| InvalidImage {
            name: name.to_owned(),
            problem,
        };
        if name.is_empty() || name.len() > 512 {
            return Err(refuse("it must have 1 to 512 characters"));
        }
        if name
            .bytes()
            .any(|c| c.is_ascii_whitespace() || c.is_ascii_control())
        {
            return Err(refuse("it holds a space"));
        }
        let (rest, digest) = match name.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (name, None),
        };
        if let Some(digest) = digest {
            let well_formed = digest.split_once(':').is_some_and(|(algorithm, hex)| {
                !algorithm.is_empty() && hex.len() >= 32 && hex.bytes().all(|c| c.is_ascii_hexdigit())
            });
            if !well_formed {
                return Err(refuse("its digest is not ALGORITHM:HEX"));
            }
        }
        let (named, tag) = match rest.rsplit_once(':') {
            Some((named, tag)) if !tag.contains('/') => (named, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag {
            let character = |c: u8| c.is_ascii_alphanumeric() || b"_.-".contains(&c);
            if tag.is_empty()
                || tag.len() > 128
                || !tag.bytes().all(character)
                || b".-".contains(&tag.as_bytes()[0])
            {
                return Err(refuse("its tag is not a word of at most 128 characters"));
            }
        }
        let is_registry = |text: &str| text.contains(['.', ':']) || text == "localhost";
        let (registry, path) = match named.split_once('/') {
            Some((registry, path)) if is_registry(registry) => (registry.to_owned(), path.to_owned()),
            Some(_) => (DEFAULT_REGISTRY.into(), named.to_owned()),
            None => (DEFAULT_REGISTRY.into(), format!("library/{named}")),
        };
        if !is_registry_name(&registry) {
            return Err(refuse("its registry is not HOST or HOST:PORT"));
        }
        let component = |part: &str| {
            let edge = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
            let bytes = part.as_bytes();
            !bytes.is_empty()
                && edge(bytes[0])
                && edge(bytes[bytes.len() - 1])
                && bytes.iter().all(|&c| edge(c) || b"._-".contains(&c))
        };
        if !path.split('/').all(component) {
            return Err(refuse(
                "its parts must be of lower-case letters, digits, '.', '_' and '-'",
            ));
        }
        Ok(Self {
            registry,
            path,
            tag: tag.map(Into::into),
            digest: digest.map(Into::into),
        })
    }

    /// `registry/path`: what an access is proven for, whatever the tag.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.registry, self.path)
    }

    /// The name with nothing left to be filled in, which is no image's id or the
    /// beginning of one. As Docker has it, a digest makes the tag idle.
    pub fn canonical(&self) -> String {
        let repository = self.repository();
        match (&self.digest, &self.tag) {
            (Some(digest), _) => format!("{repository}@{digest}"),
            (None, Some(tag)) => format!("{repository}:{tag}"),
            (None, None) => format!("{repository}:latest"),
        }
    }

    /// The credential whose registry fits best: the longest path wins. None if none fits.
    pub fn credential<'a>(&self, credentials: &'a [RegistryCredential]) -> Option<&'a RegistryCredential> {
        credentials
            .iter()
            .filter_map(|c| self.fits(&c.registry).map(|length| (length, c)))
            .max_by_key(|(length, _)| *length)
            .map(|(_, credential)| credential)
    }

    /// How many characters of path a key of .dockerconfigjson shares; None if it is
    /// for something else.
    fn fits(&self, key: &str) -> Option<usize> {
        let key = key
            .strip_prefix("https://")
            .or_else(|| key.strip_prefix("http://"))
            .unwrap_or(key);
        let (host, path) = key.split_once('/').unwrap_or((key, ""));
        // Docker writes its own registry so.
        let (host, path) = match host {
            "index.docker.io" | "registry-1.docker.io" => (DEFAULT_REGISTRY, path.trim_start_matches("v1/")),
            _ => (host, path),
        };
        let path = path.trim_end_matches('/');
        let path = if matches!(path, "v1" | "v2") { "" } else { path };
        if !host_fits(host, &self.registry) {
            return None;
        }
        let below = path.is_empty()
            || self.path == path
            || self
                .path
                .strip_prefix(path)
                .is_some_and(|rest| rest.starts_with('/'));
        below.then_some(path.len())
    }
}

/// `HOST`, `HOST:PORT`, `[V6]` or `[V6]:PORT`.
fn is_registry_name(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
    };
    let named = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.len() <= 253 && host.split('.').all(label),
    };
    named && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port != 0))
}

/// `*` stands for a part between dots, or for some of it.
fn host_fits(pattern: &str, host: &str) -> bool {
    let split = |text: &str| -> (Vec<String>, Option<String>) {
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) => (name, Some(port.to_owned())),
            None => (text, None),
        };
        (name.split('.').map(str::to_owned).collect(), port)
    };
    let ((pattern, pattern_port), (host, host_port)) = (split(pattern), split(host));
    pattern_port == host_port
        && pattern.len() == host.len()
        && pattern.iter().zip(&host).all(|(p, h)| glob(p, h))
}

fn glob(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(mut text) = text.strip_prefix(head) else {
        return false;
    };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        match text.find(part) {
            Some(at) => text = &text[at + part.len()..],
            None => return false,
        }
    }
    text.ends_with(last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_reference_is_read_as_docker_reads_it() {
        for (name, registry, path, tag) in [
            ("busybox", "docker.io", "library/busybox", None),
            ("busybox:1.36", "docker.io", "library/busybox", Some("1.36")),
            ("team/app", "docker.io", "team/app", None),
            ("localhost/app:v1", "localhost", "app", Some("v1")),
            ("127.0.0.1:5000/a/b", "127.0.0.1:5000", "a/b", None),
            ("ghcr.io/a/b:c", "ghcr.io", "a/b", Some("c")),
            ("[::1]:5000/a", "[::1]:5000", "a", None),
        ] {
            let reference = Reference::parse(name).unwrap();
            assert_eq!(
                (
                    reference.registry.as_str(),
                    reference.path.as_str(),
                    reference.tag.as_deref()
                ),
                (registry, path, tag),
                "{name}"
            );
        }
        let digest = format!("a@sha256:{}", "0".repeat(64));
        assert!(Reference::parse(&digest).unwrap().digest.is_some());
    }

    #[test]
    fn a_canonical_name_is_never_an_images_id_or_the_beginning_of_one() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        for (name, canonical) in [
            ("0a0a", "docker.io/library/0a0a:latest".to_owned()),
            (&digest, format!("docker.io/library/{digest}")),
            ("a/b:c", "docker.io/a/b:c".to_owned()),
            (&format!("x.io/a:b@{digest}"), format!("x.io/a@{digest}")),
        ] {
            let reference = Reference::parse(name).unwrap();
            assert_eq!(reference.canonical(), canonical);
            assert_eq!(
                Reference::parse(&canonical).unwrap().canonical(),
                canonical,
                "it is its own canonical name"
            );
        }
    }

    #[test]
    fn a_reference_no_registry_can_have_is_refused() {
        for name in [
            "",
            "UPPER",
            "a b",
            "a:",
            "a:b:c",
            "a@sha256:xyz",
            "a//b",
            "/a",
            "a/",
            "a:-x",
            "-a",
            "user:secret@registry.example/a",
            "registry.example:0/a",
            "registry.example:70000/a",
            "registry..example/a",
            "registry.example?x/a",
            "[fe80::1%eth0]:5000/a",
            "[::1/a",
            "::1/a",
        ] {
            assert!(Reference::parse(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn the_credential_with_the_longest_path_is_taken() {
        let credential = |registry: &str| RegistryCredential {
            registry: registry.into(),
            username: registry.into(),
            password: String::new(),
        };
        let all = [
            credential("registry.example"),
            credential("registry.example/team"),
            credential("*.example.org"),
            credential("https://index.docker.io/v1/"),
            credential("127.0.0.1:5000"),
        ];
        for (image, registry) in [
            ("registry.example/other/app", Some("registry.example")),
            ("registry.example/team/app", Some("registry.example/team")),
            ("registry.example/teams/app", Some("registry.example")),
            ("eu.example.org/app", Some("*.example.org")),
            ("a.b.example.org/app", None),
            ("busybox", Some("https://index.docker.io/v1/")),
            ("127.0.0.1:5000/app", Some("127.0.0.1:5000")),
            ("127.0.0.1:5001/app", None),
        ] {
            let found = Reference::parse(image)
                .unwrap()
                .credential(&all)
                .map(|c| c.registry.as_str());
            assert_eq!(found, registry, "{image}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(name in ".{0,80}", key in ".{0,40}") {
            if let Ok(reference) = Reference::parse(&name) {
                reference.credential(&[RegistryCredential {
                    registry: key,
                    username: String::new(),
                    password: String::new(),
                }]);
            }
        }
    }
}

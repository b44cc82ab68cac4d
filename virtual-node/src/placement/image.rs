//! An image's name as a container runtime tells it, so that the cell's scheduler can
//! compare what a claim needs with what hosts have. Pure.

/// `web` is `docker.io/library/web:latest`; what says its registry stays as it is.
pub(super) fn whole_name(image: &str) -> String {
    let (first, rest) = image.split_once('/').unwrap_or(("", image));
    let is_registry = first == "localhost" || first.contains(['.', ':']);
    let named = match (first, is_registry) {
        ("", _) => format!("docker.io/library/{rest}"),
        (_, true) => image.to_owned(),
        (_, false) => format!("docker.io/{image}"),
    };
    // A digest makes the tag idle, and the runtime drops it.
    if let Some((tagged, digest)) = named.split_once('@') {
        let repository = match tagged.rsplit_once(':') {
            Some((repository, tag)) if !tag.contains('/') => repository,
            _ => tagged,
        };
        return format!("{repository}@{digest}");
    }
    let last = named.rsplit('/').next().unwrap_or_default();
    if last.contains(':') {
        named
    } else {
        format!("{named}:latest")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_named_as_its_runtime_names_it() {
        for (image, name) in [
            ("web", "docker.io/library/web:latest"),
            ("web:1", "docker.io/library/web:1"),
            ("team/web:1", "docker.io/team/web:1"),
            ("registry.example/web", "registry.example/web:latest"),
            (
                "registry.example:5000/a/web",
                "registry.example:5000/a/web:latest",
            ),
            ("localhost/web:1", "localhost/web:1"),
            ("web@sha256:abc", "docker.io/library/web@sha256:abc"),
            ("web:1@sha256:abc", "docker.io/library/web@sha256:abc"),
            (
                "registry.example:5000/web@sha256:abc",
                "registry.example:5000/web@sha256:abc",
            ),
        ] {
            assert_eq!(whole_name(image), name, "{image}");
        }
    }
}

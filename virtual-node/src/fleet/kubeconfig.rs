//! A tenant's kubeconfig, as a process of many tenants may use it. Pure.
//!
//! A kubeconfig can name files to read, commands to run and proxies to go by. In a
//! process that holds other tenants' credentials that is a way to all of them: a token
//! file that is the process's own would be sent to the tenant's server. So everything
//! is inline, or it is refused by its field.

use std::net::IpAddr;

use kube::config::Kubeconfig;
use pool_agent_api::Invalid;

/// Parsed, and found to name nothing of this machine.
pub(crate) fn parse(field: &str, text: &str) -> Result<Kubeconfig, Invalid> {
    let config = Kubeconfig::from_yaml(text)
        .map_err(|_| Invalid::new(field, "is no kubeconfig (its contents are not shown)"))?;
    check(&config).map_err(|invalid| invalid.within(field))?;
    Ok(config)
}

fn check(config: &Kubeconfig) -> Result<(), Invalid> {
    let refuse = |field: String, given: bool, instead: &str| {
        if given {
            return Err(Invalid::new(field, format_args!("is not taken here: {instead}")));
        }
        Ok(())
    };
    for (i, named) in config.clusters.iter().enumerate() {
        let at = |field: &str| format!("clusters[{i}].cluster.{field}");
        let Some(cluster) = &named.cluster else { continue };
        refuse(
            at("certificate-authority"),
            cluster.certificate_authority.is_some(),
            "give certificate-authority-data",
        )?;
        refuse(
            at("proxy-url"),
            cluster.proxy_url.is_some(),
            "the server is dialled directly",
        )?;
        refuse(
            at("insecure-skip-tls-verify"),
            cluster.insecure_skip_tls_verify == Some(true),
            "give certificate-authority-data",
        )?;
        server(cluster.server.as_deref().unwrap_or_default())
            .map_err(|problem| Invalid::new(at("server"), problem))?;
    }
    for (i, named) in config.auth_infos.iter().enumerate() {
        let at = |field: &str| format!("users[{i}].user.{field}");
        let Some(user) = &named.auth_info else { continue };
        refuse(
            at("exec"),
            user.exec.is_some(),
            "no commands are run; give client-certificate-data or a token",
        )?;
        refuse(
            at("auth-provider"),
            user.auth_provider.is_some(),
            "give client-certificate-data or a token",
        )?;
        refuse(
            at("tokenFile"),
            user.token_file.is_some(),
            "give the token itself",
        )?;
        refuse(
            at("client-certificate"),
            user.client_certificate.is_some(),
            "give client-certificate-data",
        )?;
        refuse(
            at("client-key"),
            user.client_key.is_some(),
            "give client-key-data",
        )?;
    }
    if config.current_context.as_deref().unwrap_or_default().is_empty() {
        return Err(Invalid::new("current-context", "is required"));
    }
    Ok(())
}

/// Over TLS, and nothing that is this machine's own or its cloud's metadata service.
fn server(url: &str) -> Result<(), String> {
    let uri: http::Uri = url.parse().map_err(|_| format!("{url:?} is no URL"))?;
    if uri.scheme_str() != Some("https") {
        return Err("must be https".into());
    }
    let host = uri.host().unwrap_or_default();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let own = match bare.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
        Ok(IpAddr::V4(ip)) => ip.is_loopback() || ip.is_link_local() || ip.is_unspecified(),
        Ok(IpAddr::V6(ip)) => ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified(),
        Err(_) => {
            let name = bare.trim_end_matches('.').to_ascii_lowercase();
            // An address in another spelling, such as 0x7f000001, resolves too.
            name == "localhost"
                || name.ends_with(".localhost")
                || !name
                    .split('.')
                    .next_back()
                    .is_some_and(|last| last.starts_with(|c: char| c.is_ascii_alphabetic()))
        }
    };
    if own {
        return Err(format!("{host} is an address of the process's own machine"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
apiVersion: v1
kind: Config
current-context: c
contexts: [{name: c, context: {cluster: k, user: u}}]
clusters: [{name: k, cluster: {server: "https://api.acme.example:6443", certificate-authority-data: QQ==}}]
users: [{name: u, user: {client-certificate-data: QQ==, client-key-data: QQ==}}]
"#;

    #[test]
    fn a_kubeconfig_that_names_something_of_the_machine_is_refused_by_its_field() {
        parse("kubeconfig", GOOD).unwrap();
        let user = |with: &str| GOOD.replace("client-certificate-data: QQ==", with);
        let server = |url: &str| GOOD.replace("https://api.acme.example:6443", url);
        for (text, field) in [
            (
                user("exec: {command: sh, apiVersion: client.authentication.k8s.io/v1}"),
                "kubeconfig.users[0].user.exec",
            ),
            (
                user("tokenFile: /var/run/secrets/token"),
                "kubeconfig.users[0].user.tokenFile",
            ),
            (
                user("client-certificate: /etc/crt"),
                "kubeconfig.users[0].user.client-certificate",
            ),
            (
                user("auth-provider: {name: gcp, config: {}}"),
                "kubeconfig.users[0].user.auth-provider",
            ),
            (
                GOOD.replace("client-key-data: QQ==", "client-key: /etc/key"),
                "kubeconfig.users[0].user.client-key",
            ),
            (
                GOOD.replace(
                    "certificate-authority-data: QQ==",
                    "certificate-authority: /etc/ca",
                ),
                "kubeconfig.clusters[0].cluster.certificate-authority",
            ),
            (
                GOOD.replace(
                    "certificate-authority-data: QQ==",
                    "proxy-url: http://127.0.0.1:1",
                ),
                "kubeconfig.clusters[0].cluster.proxy-url",
            ),
            (
                GOOD.replace(
                    "certificate-authority-data: QQ==",
                    "insecure-skip-tls-verify: true",
                ),
                "kubeconfig.clusters[0].cluster.insecure-skip-tls-verify",
            ),
            (
                server("http://api.acme.example"),
                "kubeconfig.clusters[0].cluster.server",
            ),
            (
                server("https://127.0.0.1:6443"),
                "kubeconfig.clusters[0].cluster.server",
            ),
            (
                server("https://[::ffff:127.0.0.1]:6443"),
                "kubeconfig.clusters[0].cluster.server",
            ),
            (
                server("https://169.254.169.254"),
                "kubeconfig.clusters[0].cluster.server",
            ),
            (
                server("https://localhost:6443"),
                "kubeconfig.clusters[0].cluster.server",
            ),
            (
                server("https://0x7f000001"),
                "kubeconfig.clusters[0].cluster.server",
            ),
            (
                server("https://2130706433"),
                "kubeconfig.clusters[0].cluster.server",
            ),
            (
                GOOD.replace("current-context: c", ""),
                "kubeconfig.current-context",
            ),
        ] {
            let refused = parse("kubeconfig", &text).unwrap_err();
            assert_eq!(refused.field, field, "{text}\n{refused}");
        }
    }
}

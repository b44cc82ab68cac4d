use rustls::{RootCertStore, client::verify_server_cert_signed_by_trust_anchor, server::ParsedCertificate};
use rustls_pki_types::UnixTime;

use super::*;

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const DAY: Duration = Duration::from_secs(24 * 3600);

fn at(days: u32) -> SystemTime {
    SystemTime::UNIX_EPOCH + DAY * (20_000 + days)
}

fn request(uri: &str) -> Csr {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    // Wishes that must not come true.
    params.distinguished_name.push(DnType::CommonName, "admin");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().unwrap();
    Csr::parse(&params.serialize_request(&key).unwrap().pem().unwrap()).unwrap()
}

fn der(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .unwrap()
}

/// Verifies as rustls does, and answers the leaf.
fn verify(chain: &[String], now: SystemTime) -> Result<CertificateDer<'static>, rustls::Error> {
    let [leaf, between @ .., roots] = chain else {
        panic!("{} elements", chain.len())
    };
    let mut store = RootCertStore::empty();
    for root in der(roots) {
        store.add(root).unwrap();
    }
    let leaf = der(leaf).remove(0);
    let between: Vec<_> = between.iter().flat_map(|pem| der(pem)).collect();
    verify_server_cert_signed_by_trust_anchor(
        &ParsedCertificate::try_from(&leaf)?,
        &store,
        &between,
        UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap()),
        rustls::crypto::aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .all,
    )?;
    Ok(leaf)
}

fn new_dir() -> (tempfile::TempDir, PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("ca");
    (parent, dir)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn an_authority_is_made_once_with_tight_modes() {
    let (_parent, dir) = new_dir();
    let first = Authority::open(&dir, at(0)).unwrap();
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join(ROOT_KEY)), 0o600);
    assert_eq!(mode(&dir.join(CA_KEY)), 0o600);
    let again = Authority::open(&dir, at(1)).unwrap();
    assert_eq!(first.roots, again.roots);
    assert_eq!(first.intermediates, again.intermediates);
    let left: Vec<_> = fs::read_dir(&dir).unwrap().collect();
    assert_eq!(left.len(), 4, "{left:?}");
}

#[test]
fn a_leaf_says_the_identity_and_nothing_else_that_was_asked_for() {
    let (_parent, dir) = new_dir();
    let authority = Authority::open(&dir, at(0)).unwrap();
    let csr = request(WEB);
    let chain = authority.sign(&csr, Duration::ZERO, at(1)).unwrap();
    assert_eq!(chain.len(), 3);
    let leaf = verify(&chain, at(1)).unwrap();
    let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
    let names = &leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical, "the subject is empty (RFC 5280, 4.2.1.6)");
    assert_eq!(
        format!("{:?}", names.value.general_names),
        format!("[URI({WEB:?})]")
    );
    assert_eq!(leaf.subject().iter().count(), 0);
    assert!(!leaf.is_ca());
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.client_auth && extended.server_auth && !extended.any);
    let (from, to) = (leaf.validity().not_before, leaf.validity().not_after);
    let now = OffsetDateTime::from(at(1));
    assert_eq!(from.to_datetime(), now - BACKDATED);
    assert_eq!(to.to_datetime(), now + MAX_TTL);
}

#[test]
fn a_leaf_lives_no_longer_than_a_day_nor_than_its_issuer() {
    let (_parent, dir) = new_dir();
    let authority = Authority::open(&dir, at(0)).unwrap();
    let life = |ttl, now| {
        let chain = authority.sign(&request(WEB), ttl, now).unwrap();
        let leaf = der(&chain[0]).remove(0);
        let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
        SystemTime::from(leaf.validity().not_after.to_datetime())
            .duration_since(now)
            .unwrap()
    };
    let hour = Duration::from_secs(3600);
    assert_eq!(life(hour, at(1)), hour);
    assert_eq!(life(DAY * 365, at(1)), DAY);
    let near_the_end = authority.not_after() - hour;
    assert_eq!(life(DAY, near_the_end), hour);
}

#[test]
fn loose_modes_are_refused() {
    for (name, loose) in [
        ("", 0o750),
        ("", 0o701),
        (CA_KEY, 0o640),
        (CA_KEY, 0o604),
        (ROOT_KEY, 0o640),
    ] {
        let (_parent, dir) = new_dir();
        Authority::open(&dir, at(0)).unwrap();
        // A root key is read when an intermediate is made with it.
        if name == ROOT_KEY {
            fs::remove_file(dir.join(CA_CERT)).unwrap();
        }
        let path = dir.join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(loose)).unwrap();
        match Authority::open(&dir, at(0)) {
            Err(OpenError::Loose {
                path: named, mode, ..
            }) => {
                assert_eq!((named, mode), (path, loose));
            }
            other => panic!("{name:?} {loose:o}: {:?}", other.err()),
        }
    }
}

#[test]
fn the_root_key_may_be_taken_away() {
    let (_parent, dir) = new_dir();
    Authority::open(&dir, at(0)).unwrap();
    fs::remove_file(dir.join(ROOT_KEY)).unwrap();
    let authority = Authority::open(&dir, at(1)).unwrap();
    verify(&authority.sign(&request(WEB), DAY, at(1)).unwrap(), at(1)).unwrap();
}

#[test]
fn an_intermediate_is_replaced_when_it_is_deleted_or_ends() {
    let (_parent, dir) = new_dir();
    let first = Authority::open(&dir, at(0)).unwrap();
    let old = first.sign(&request(WEB), DAY, at(0)).unwrap();
    fs::remove_file(dir.join(CA_CERT)).unwrap();
    let second = Authority::open(&dir, at(0)).unwrap();
    assert_ne!(first.intermediates, second.intermediates);
    assert_eq!(
        first.roots, second.roots,
        "what the old one signed is still trusted"
    );
    verify(&old, at(0)).unwrap();
    let late = second.not_after() + DAY;
    let third = Authority::open(&dir, late).unwrap();
    verify(&third.sign(&request(WEB), DAY, late).unwrap(), late).unwrap();
}

#[test]
fn files_that_do_not_fit_together_are_refused_by_name() {
    let other = new_dir();
    Authority::open(&other.1, at(0)).unwrap();
    let broken = |break_it: &dyn Fn(&Path)| {
        let (_parent, dir) = new_dir();
        Authority::open(&dir, at(0)).unwrap();
        break_it(&dir);
        let error = Authority::open(&dir, at(0)).err().unwrap().to_string();
        error.replace(dir.to_str().unwrap(), "CA")
    };
    let take = |from: &'static str| {
        let other = other.1.clone();
        move |dir: &Path| {
            fs::copy(other.join(from), dir.join(from)).unwrap();
        }
    };
    let write =
        |name: &'static str, text: &'static str| move |dir: &Path| fs::write(dir.join(name), text).unwrap();
    let delete = |name: &'static str| move |dir: &Path| fs::remove_file(dir.join(name)).unwrap();
    type Breaking<'a> = &'a dyn Fn(&Path);
    let cases: [(Breaking<'_>, &str); 7] = [
        (&take(CA_KEY), "CA/ca-cert.pem and CA/ca-key.pem are no pair"),
        (
            &take(ROOT_CERT),
            "CA/ca-cert.pem does not lead to a root in CA/root-cert.pem",
        ),
        (
            &write(CA_CERT, "nonsense"),
            "CA/ca-cert.pem is not PEM with what belongs there",
        ),
        (
            &write(CA_KEY, "nonsense"),
            "CA/ca-key.pem is not PEM with what belongs there",
        ),
        (
            &write(CHAIN, "nonsense"),
            "CA/cert-chain.pem is not PEM with what belongs there",
        ),
        (
            &delete(ROOT_CERT),
            "CA/root-cert.pem is missing; a certificate authority needs it, or an empty directory to begin in",
        ),
        (
            &delete(CA_KEY),
            "CA/ca-key.pem is missing; a certificate authority needs it, or an empty directory to begin in",
        ),
    ];
    for (break_it, expected) in cases {
        assert_eq!(broken(break_it), expected);
    }
}

#[test]
fn a_chain_of_several_intermediates_is_sent_whole() {
    // A plug-in CA: root → upper → ours; the root's key is elsewhere.
    let (_parent, dir) = new_dir();
    fs::DirBuilder::new().mode(0o700).create(&dir).unwrap();
    let now = OffsetDateTime::from(at(0));
    let root_key = KeyPair::generate().unwrap();
    let root = authority("root", ROOT_LIFE, now);
    let root_pem = root.self_signed(&root_key).unwrap().pem();
    let upper_key = KeyPair::generate().unwrap();
    let upper = authority("upper", ROOT_LIFE, now);
    let upper_pem = upper
        .signed_by(&upper_key, &Issuer::from_params(&root, &root_key))
        .unwrap()
        .pem();
    let key = KeyPair::generate().unwrap();
    let ours = authority("ours", ROOT_LIFE, now)
        .signed_by(&key, &Issuer::from_params(&upper, &upper_key))
        .unwrap()
        .pem();
    write_file(&dir.join(CA_KEY), &key.serialize_pem(), 0o600).unwrap();
    write_file(&dir.join(CA_CERT), &ours, 0o644).unwrap();
    write_file(&dir.join(ROOT_CERT), &root_pem, 0o644).unwrap();
    // Istio's chain file begins with our own and may end with the root.
    write_file(&dir.join(CHAIN), &[ours, upper_pem, root_pem].concat(), 0o644).unwrap();
    let authority = Authority::open(&dir, at(0)).unwrap();
    let chain = authority.sign(&request(WEB), DAY, at(0)).unwrap();
    assert_eq!(chain.len(), 4);
    verify(&chain, at(0)).unwrap();
}

#[test]
fn a_certificate_that_may_not_sign_is_no_authority() {
    let (_parent, dir) = new_dir();
    let authority = Authority::open(&dir, at(0)).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(WEB.try_into().unwrap())];
    let csr = Csr::parse(&params.serialize_request(&key).unwrap().pem().unwrap()).unwrap();
    let chain = authority.sign(&csr, DAY, at(0)).unwrap();
    write_file(&dir.join(CA_CERT), &chain[0], 0o644).unwrap();
    write_file(&dir.join(CA_KEY), &key.serialize_pem(), 0o600).unwrap();
    fs::remove_file(dir.join(ROOT_KEY)).unwrap();
    assert!(matches!(
        Authority::open(&dir, at(0)),
        Err(OpenError::NotCa { .. })
    ));
}

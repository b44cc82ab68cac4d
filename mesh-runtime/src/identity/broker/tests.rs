use std::sync::LazyLock;

use rcgen::{BasicConstraints, ExtendedKeyUsagePurpose, IsCa, Issuer};

use super::*;

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Self {
            pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    fn sign(&self, key: &impl rcgen::PublicKeyData, change: impl FnOnce(&mut CertificateParams)) -> String {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(WEB.try_into().unwrap())];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        change(&mut params);
        params.signed_by(key, &self.issuer).unwrap().pem()
    }
}

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
static MESH: LazyLock<Authority> = LazyLock::new(Authority::new);

fn web() -> Identity {
    WEB.parse().unwrap()
}

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
}

fn checked(key: &KeyPair, chain: &[String]) -> Result<Certificate, InvalidAnswer> {
    check(&web(), key, chain, SystemTime::now())
}

#[test]
fn a_request_names_the_identity_in_the_csr_and_beside_it() {
    let key = key();
    let request = request(&web(), &key).unwrap();
    let csr = rcgen::CertificateSigningRequestParams::from_pem(&request.csr).unwrap();
    assert_eq!(
        csr.params.subject_alt_names,
        [SanType::URI(WEB.try_into().unwrap())]
    );
    assert_eq!(csr.params.distinguished_name.iter().count(), 0);
    let asked = &request.metadata.unwrap().fields["ImpersonatedIdentity"];
    assert_eq!(asked.kind, Some(Kind::StringValue(WEB.to_owned())));
    assert_eq!(request.validity_duration, 24 * 3600);
    assert!(!request.csr.contains("PRIVATE"));
}

#[test]
fn a_good_answer_is_taken_with_its_times() {
    let key = key();
    let chain = [MESH.sign(&key, |_| {}), MESH.pem.clone()];
    let certificate = checked(&key, &chain).unwrap();
    assert_eq!(certificate.identity, web());
    assert!(certificate.not_before < certificate.not_after);
}

#[test]
fn an_intermediate_leads_to_the_root() {
    let between_key = KeyPair::generate().unwrap();
    let mut between = CertificateParams::default();
    between.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let between_pem = between.signed_by(&between_key, &MESH.issuer).unwrap().pem();
    let authority = Authority {
        pem: between_pem.clone(),
        issuer: Issuer::new(between, between_key),
    };
    let key = key();
    let leaf = authority.sign(&key, |_| {});
    checked(&key, &[leaf.clone(), between_pem.clone(), MESH.pem.clone()]).unwrap();
    // Several in one element, as a file would have them.
    checked(&key, &[format!("{leaf}{between_pem}"), MESH.pem.clone()]).unwrap();
    checked(&key, &[leaf, MESH.pem.clone()]).unwrap_err();
}

#[test]
fn whatever_is_wrong_with_an_answer_it_is_not_taken() {
    let own = key();
    let stranger = Authority::new();
    let roots = || MESH.pem.clone();
    let uri = |uri: &str| SanType::URI(uri.try_into().unwrap());
    let named = |names: Vec<SanType>| MESH.sign(&own, |params| params.subject_alt_names = names);
    let table: Vec<(&str, Vec<String>)> = vec![
        ("nothing", vec![]),
        ("only roots", vec![roots()]),
        ("no PEM", vec!["certificate".to_owned(), roots()]),
        ("an empty element", vec![String::new(), roots()]),
        ("empty roots", vec![MESH.sign(&own, |_| {}), String::new()]),
        ("another key's", vec![MESH.sign(&key(), |_| {}), roots()]),
        ("another CA's", vec![stranger.sign(&own, |_| {}), roots()]),
        (
            "another's name",
            vec![named(vec![uri("spiffe://cluster.local/ns/shop/sa/db")]), roots()],
        ),
        (
            "another trust domain",
            vec![named(vec![uri("spiffe://other/ns/shop/sa/web")]), roots()],
        ),
        (
            "two names",
            vec![
                named(vec![uri(WEB), uri("spiffe://cluster.local/ns/shop/sa/db")]),
                roots(),
            ],
        ),
        ("no name", vec![named(vec![]), roots()]),
        (
            "servers only",
            vec![
                MESH.sign(&own, |p| {
                    p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]
                }),
                roots(),
            ],
        ),
        (
            "expired",
            vec![
                MESH.sign(&own, |p| {
                    p.not_before = rcgen::date_time_ymd(2001, 1, 1);
                    p.not_after = rcgen::date_time_ymd(2002, 1, 1);
                }),
                roots(),
            ],
        ),
    ];
    for (what, chain) in table {
        assert!(checked(&own, &chain).is_err(), "taken: {what}");
    }
}

use proptest::prelude::*;
use rcgen::{
    CertificateParams, CustomExtension, KeyPair, PKCS_ECDSA_P521_SHA512, SanType, SignatureAlgorithm,
};

use super::*;

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn request(key: &KeyPair, names: &[SanType]) -> CertificateSigningRequestDer<'static> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = names.to_vec();
    params.serialize_request(key).unwrap().der().clone()
}

fn pem(der: &[u8]) -> String {
    use base64::prelude::*;
    format!(
        "-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n",
        BASE64_STANDARD.encode(der)
    )
}

fn parse(names: &[SanType]) -> Result<Csr, InvalidCsr> {
    Csr::parse(&pem(&request(&KeyPair::generate().unwrap(), names)))
}

fn key_of(algorithm: &'static SignatureAlgorithm) -> KeyPair {
    KeyPair::generate_for(algorithm).unwrap()
}

#[test]
fn a_request_for_one_identity_is_taken_with_each_good_kind_of_key() {
    for algorithm in [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
        let key = key_of(algorithm);
        let csr = Csr::parse(&pem(&request(&key, &[uri(WEB)]))).unwrap();
        assert_eq!(csr.identity.to_string(), WEB);
        assert_eq!(csr.key.der_bytes(), key.der_bytes());
    }
}

#[test]
fn a_key_of_another_kind_is_refused() {
    let key = key_of(&PKCS_ECDSA_P521_SHA512);
    let refusal = Csr::parse(&pem(&request(&key, &[uri(WEB)])));
    assert!(matches!(refusal, Err(InvalidCsr::Key)));
}

#[test]
fn a_request_for_anything_but_one_uri_is_refused() {
    let dns = SanType::DnsName("web.shop".try_into().unwrap());
    for (names, count) in [
        (vec![], 0),
        (vec![uri(WEB), uri(WEB)], 2),
        (vec![uri(WEB), dns.clone()], 2),
        (vec![dns], 1),
    ] {
        match parse(&names) {
            Err(InvalidCsr::Names { count: counted }) => assert_eq!(counted, count),
            other => panic!("{:?}", other.map(|csr| csr.identity)),
        }
    }
}

#[test]
fn a_uri_that_is_no_identity_is_refused() {
    for text in [
        "https://example.com/",
        "spiffe://cluster.local/ns/shop",
        "spiffe://td/ns/../sa/x",
    ] {
        assert!(
            matches!(parse(&[uri(text)]), Err(InvalidCsr::Identity(_))),
            "{text}"
        );
    }
}

#[test]
fn a_request_that_was_changed_after_it_was_signed_is_refused() {
    let der = request(&KeyPair::generate().unwrap(), &[uri(WEB)]);
    let at = der.windows(3).position(|w| w == b"web").unwrap();
    let mut forged = der.to_vec();
    forged[at..at + 3].copy_from_slice(b"adm");
    assert!(matches!(Csr::parse(&pem(&forged)), Err(InvalidCsr::Signature)));
}

#[test]
fn nothing_but_one_pkcs10_request_is_taken() {
    let der = request(&KeyPair::generate().unwrap(), &[uri(WEB)]);
    assert!(matches!(Csr::parse(""), Err(InvalidCsr::Pem(_))));
    assert!(matches!(Csr::parse("garbage"), Err(InvalidCsr::Pem(_))));
    assert!(matches!(Csr::parse(&pem(b"garbage")), Err(InvalidCsr::Der)));
    let long = [&der[..], b"more"].concat();
    assert!(matches!(Csr::parse(&pem(&long)), Err(InvalidCsr::Der)));
    let large = "x".repeat(MAX_PEM_BYTES + 1);
    assert!(matches!(Csr::parse(&large), Err(InvalidCsr::TooLarge { .. })));
}

#[test]
fn other_wishes_are_passed_over() {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![uri(WEB)];
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.custom_extensions = vec![CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0])];
    let csr = Csr::parse(&params.serialize_request(&key).unwrap().pem().unwrap()).unwrap();
    assert_eq!(csr.identity.to_string(), WEB);
}

proptest! {
    #[test]
    fn garbage_is_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(Csr::parse(&pem(&bytes)).is_err());
        prop_assert!(Csr::parse(&String::from_utf8_lossy(&bytes)).is_err());
    }

    #[test]
    fn a_damaged_request_is_refused_without_a_panic(at in 0usize..300, bit in 0u8..8) {
        let key = KeyPair::generate().unwrap();
        let mut der = request(&key, &[uri(WEB)]).to_vec();
        let at = at % der.len();
        der[at] ^= 1 << bit;
        // Damage that is not noticed must not have changed what is asked for.
        if let Ok(csr) = Csr::parse(&pem(&der)) {
            prop_assert_eq!(csr.identity.to_string(), WEB);
            prop_assert_eq!(csr.key.der_bytes(), key.der_bytes());
        }
    }
}

//! Kubernetes quantities (`250m`, `1.5Gi`, `2e3`) as whole numbers.
//!
//! Used by whoever reads resources, of a Pod, a claim, a Node or a setting. Amounts are
//! rounded up, as Kubernetes does, so that a claim never shrinks. Source: the
//! API conventions' grammar of `resource.Quantity`.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use pool_agent_api::Resources;

/// Not a quantity, negative, or larger than 2^64.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an amount such as 250m, 1.5 or 64Mi")]
pub struct InvalidQuantity {
    text: String,
}

/// Amounts as Kubernetes writes them, in the API server's own spelling where that is
/// easily had: it gives back what it was told.
pub fn quantities(r: Resources) -> BTreeMap<String, Quantity> {
    let cpu = if r.cpu_millis.is_multiple_of(1000) {
        (r.cpu_millis / 1000).to_string()
    } else {
        format!("{}m", r.cpu_millis)
    };
    let bytes = |n: u64| {
        if n > 0 && n.is_multiple_of(1024) {
            format!("{}Ki", n / 1024)
        } else {
            n.to_string()
        }
    };
    BTreeMap::from([
        ("cpu".into(), Quantity(cpu)),
        ("memory".into(), Quantity(bytes(r.memory_bytes))),
        (
            "ephemeral-storage".into(),
            Quantity(bytes(r.ephemeral_storage_bytes)),
        ),
        ("pods".into(), Quantity(r.sandboxes.to_string())),
    ])
}

/// The amount in thousandths: CPU.
pub fn millis(text: &str) -> Result<u64, InvalidQuantity> {
    scaled(text, 1000)
}

/// The amount in units: bytes, counts.
pub fn whole(text: &str) -> Result<u64, InvalidQuantity> {
    scaled(text, 1)
}

/// `text` × `unit`, rounded up.
fn scaled(text: &str, unit: u128) -> Result<u64, InvalidQuantity> {
    parse(text, unit).ok_or_else(|| InvalidQuantity {
        text: text.to_owned(),
    })
}

fn parse(text: &str, unit: u128) -> Option<u64> {
    let body = text.strip_prefix('+').unwrap_or(text);
    let end = body
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(body.len());
    let (number, suffix) = body.split_at(end);
    let (integer, fraction) = number.split_once('.').unwrap_or((number, ""));
    if integer.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    // 10^-9 is the finest that Kubernetes keeps; what is finer still rounds up.
    let (mantissa, mut denominator) = {
        let mut mantissa: u128 = 0;
        let mut denominator: u128 = 1;
        for digit in integer.bytes() {
            mantissa = mantissa.checked_mul(10)?.checked_add((digit - b'0').into())?;
        }
        for digit in fraction.bytes().take(18) {
            mantissa = mantissa.checked_mul(10)?.checked_add((digit - b'0').into())?;
            denominator *= 10;
        }
        if fraction.bytes().skip(18).any(|d| d != b'0') {
            mantissa = mantissa.checked_add(1)?;
        }
        (mantissa, denominator)
    };
    let mut factor = unit;
    match suffix {
        "" => {}
        "n" => denominator = denominator.checked_mul(1_000_000_000)?,
        "u" => denominator = denominator.checked_mul(1_000_000)?,
        "m" => denominator = denominator.checked_mul(1000)?,
        "k" => factor = factor.checked_mul(1000)?,
        "M" => factor = factor.checked_mul(1_000_000)?,
        "G" => factor = factor.checked_mul(1_000_000_000)?,
        "T" => factor = factor.checked_mul(1_000_000_000_000)?,
        "P" => factor = factor.checked_mul(1_000_000_000_000_000)?,
        "E" => factor = factor.checked_mul(1_000_000_000_000_000_000)?,
        "Ki" => factor = factor.checked_mul(1 << 10)?,
        "Mi" => factor = factor.checked_mul(1 << 20)?,
        "Gi" => factor = factor.checked_mul(1 << 30)?,
        "Ti" => factor = factor.checked_mul(1 << 40)?,
        "Pi" => factor = factor.checked_mul(1 << 50)?,
        "Ei" => factor = factor.checked_mul(1 << 60)?,
        exponent => {
            let digits = exponent.strip_prefix(['e', 'E'])?;
            let power: i32 = digits.parse().ok()?;
            let scale = 10_u128.checked_pow(power.unsigned_abs())?;
            if power >= 0 {
                factor = factor.checked_mul(scale)?;
            } else {
                denominator = denominator.checked_mul(scale)?;
            }
        }
    }
    let amount = mantissa.checked_mul(factor)?.div_ceil(denominator);
    u64::try_from(amount).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_suffix_has_its_weight() {
        for (text, expected) in [
            ("0", 0),
            ("1", 1),
            ("1.5", 2),
            ("100m", 1),
            ("1k", 1000),
            ("64Mi", 64 << 20),
            ("1.5Gi", 3 << 29),
            ("2e3", 2000),
            ("2E3", 2000),
            ("1E", 1_000_000_000_000_000_000),
            ("12e-1", 2),
            (".5", 1),
            ("5.", 5),
            ("+3", 3),
            ("1u", 1),
        ] {
            assert_eq!(whole(text), Ok(expected), "{text}");
        }
        for (text, expected) in [
            ("250m", 250),
            ("2", 2000),
            ("0.1", 100),
            ("1n", 1),
            ("1500000n", 2),
        ] {
            assert_eq!(millis(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_amount_is_refused() {
        for text in [
            "",
            "-1",
            ".",
            "1.2.3",
            "1Zi",
            "Mi",
            "1 Gi",
            "1e",
            "1e99",
            "0x10",
            "99999999999E",
            "NaN",
        ] {
            assert!(whole(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,40}") {
            drop((whole(&text), millis(&text)));
        }

        #[test]
        fn a_whole_number_is_itself(n in any::<u64>()) {
            prop_assert_eq!(whole(&n.to_string()), Ok(n));
        }
    }
}

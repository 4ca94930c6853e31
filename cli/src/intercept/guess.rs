//! Values that mark requests as somebody's: made at random, and judged where a person made them up.
//!
//! Whoever knows such a value can steer requests to the workstation behind it, so it should be as hard to guess as a key.

/// Header with a random value that an intercept gets when nothing else says which requests it wants.
pub const HEADER: &str = "x-tp-intercept";

/// RFC 4648's base32, lower-case.
const BASE32: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// 128 random bits as 26 letters and digits.
#[must_use]
pub fn random_value() -> String {
    base32(rand::random())
}

fn base32(bits: u128) -> String {
    let digit = |n: u32| {
        // The first digit holds the three bits that are left over.
        let five = (bits >> (5 * (25 - n))) & 31;
        char::from(BASE32[usize::try_from(five).expect("five bits")])
    };
    (0..26).map(digit).collect()
}

/// Whether somebody could guess the value. Only what looks random is none: at least 20 letters and digits that change
/// between the two, or between cases, as often as random ones do.
#[must_use]
pub fn is_guessable(value: &str) -> bool {
    let characters: Vec<char> = value.chars().filter(char::is_ascii_alphanumeric).collect();
    let kind = |c: char| (c.is_ascii_digit(), c.is_ascii_uppercase());
    let changes = characters
        .windows(2)
        .filter(|pair| kind(pair[0]) != kind(pair[1]))
        .count();
    characters.len() < 20 || changes < 4.max(characters.len() / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_value_holds_128_bits() {
        assert_eq!(base32(0), "a".repeat(26));
        assert_eq!(base32(1), format!("{}b", "a".repeat(25)));
        assert_eq!(base32(u128::MAX), format!("h{}", "7".repeat(25)));
        assert_eq!(base32(31 << 5), format!("{}7a", "a".repeat(24)));
        assert_ne!(random_value(), random_value());
    }

    #[test]
    fn random_values_pass_and_made_up_ones_do_not() {
        for good in [
            "5f2d8c1e-94b7-4a63-8e0f-d17b6a9c3e52",
            "9b1deb4d3b7d4bad9bdd2b0d7b3dcb6d",
            "mzxw6ytboi2dgnbvgy3tqojq4a",
            "Zm9vYmFyMTIzNDU2Nzg5MGFi",
        ] {
            assert!(!is_guessable(good), "{good}");
        }
        for bad in [
            "",
            "ada",
            "true",
            "ada@example.com",
            "my-very-long-feature-branch-name",
            "feature/SHOP-1234-new-checkout",
            "00000000000000000000000000000000",
            "1234567890123456789012345",
            "ada-laptop-2026-11-22",
        ] {
            assert!(is_guessable(bad), "{bad}");
        }
    }
}

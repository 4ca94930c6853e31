//! Bytes that can be checked without being kept: a stream that is a function of its seed.
//!
//! Two flows have two seeds, so that bytes which land in the wrong flow, or in the wrong place, do not go unseen.

/// An endless stream of bytes.
#[derive(Clone, Debug)]
pub(crate) struct Pattern(u64);

impl Pattern {
    /// The stream of `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next bytes of the stream.
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) {
        for byte in buffer {
            // xorshift64: never zero, period 2^64 - 1.
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *byte = (self.0 >> 32) as u8;
        }
    }

    /// The first `len` bytes of the stream of `seed`.
    pub(crate) fn bytes(seed: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        Self::new(seed).fill(&mut bytes);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_same_however_it_is_cut() {
        let (whole, mut pattern) = (Pattern::bytes(5, 1_000), Pattern::new(5));
        let mut pieces = Vec::new();
        for len in [1, 99, 0, 400, 500] {
            let mut piece = vec![0; len];
            pattern.fill(&mut piece);
            pieces.extend(piece);
        }
        assert_eq!(whole, pieces);
        assert_ne!(whole, Pattern::bytes(6, 1_000));
    }
}

//! [`Mersenne`]: the 32-bit Mersenne Twister (Matsumoto and Nishimura, ACM TOMACS 8(1), 1998), seeded as in torch.

const WORDS: usize = 624;
const SHIFT: usize = 397;

/// The state of mt19937: 624 words, and how many were used since the last twist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mersenne {
    words: Vec<u32>,
    used: usize,
}

impl Mersenne {
    /// The initial state for `seed`. The first call of [`Self::next`] twists it.
    pub(crate) fn new(seed: u32) -> Self {
        let mut words = vec![seed];
        for index in 1..WORDS as u32 {
            let last = words[words.len() - 1];
            words.push((last ^ (last >> 30)).wrapping_mul(1_812_433_253).wrapping_add(index));
        }
        Self { words, used: WORDS }
    }

    /// A saved state, or `None` if it is invalid.
    pub(crate) fn restore(words: Vec<u32>, used: usize) -> Option<Self> {
        (words.len() == WORDS && used <= WORDS).then_some(Self { words, used })
    }

    /// The arguments of [`Self::restore`].
    pub(crate) fn into_parts(self) -> (Vec<u32>, usize) {
        (self.words, self.used)
    }

    /// The next 32 bits.
    pub(crate) fn next(&mut self) -> u32 {
        if self.used == WORDS {
            self.twist();
        }
        let mut word = self.words[self.used];
        self.used += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn twist(&mut self) {
        for index in 0..WORDS {
            let high = self.words[index] & 0x8000_0000;
            let low = self.words[(index + 1) % WORDS];
            let mixed = (high | (low & 0x7fff_ffff)) >> 1;
            let odd = if low & 1 == 1 { 0x9908_b0df } else { 0 };
            self.words[index] = self.words[(index + SHIFT) % WORDS] ^ mixed ^ odd;
        }
        self.used = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference implementation's published check: the 10000th value of seed 5489.
    #[test]
    fn the_published_value() {
        let mut generator = Mersenne::new(5489);
        let last = (0..10_000).map(|_| generator.next()).last();
        assert_eq!(last, Some(4_123_659_995));
    }
}

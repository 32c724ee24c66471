//! The 256 values of a block of a K format in vectors of 16 lanes, and sums over them in a fixed order: every instruction
//! set gives the same bits.

/// One vector.
pub type Lanes = [f32; 16];
/// A block.
pub type BlockValues = [Lanes; 16];
/// The codes of a block's values.
pub type Codes = [[u8; 16]; 16];

/// The values as vectors.
#[inline(always)]
pub fn block(values: &[f32; 256]) -> BlockValues {
    std::array::from_fn(|vector| std::array::from_fn(|lane| values[16 * vector + lane]))
}

/// The sum of all lanes.
#[inline(always)]
pub fn total(lanes: &Lanes) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|lane| lanes[lane] + lanes[lane + 8]);
    let four: [f32; 4] = std::array::from_fn(|lane| eight[lane] + eight[lane + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// The largest of all lanes by `larger`.
#[inline(always)]
pub fn largest(lanes: &Lanes, larger: impl Fn(f32, f32) -> f32) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|lane| larger(lanes[lane], lanes[lane + 8]));
    let four: [f32; 4] = std::array::from_fn(|lane| larger(eight[lane], eight[lane + 4]));
    larger(larger(four[0], four[2]), larger(four[1], four[3]))
}

/// The nearest integer, of numbers below 2²².
#[inline(always)]
pub fn rounded(value: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (value + MAGIC) - MAGIC
}

/// `value` within `least` and `most`, as one instruction each.
#[inline(always)]
pub fn within(value: f32, least: f32, most: f32) -> f32 {
    let value = if value > least { value } else { least };
    if value < most { value } else { most }
}

/// 1 / value, or 0 for 0.
#[inline(always)]
pub fn inverse(value: f32) -> f32 {
    if value == 0.0 { 0.0 } else { 1.0 / value }
}

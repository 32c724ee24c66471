//! [`Weight`]: the weight of a linear layer, its stored values with the low-rank terms of adapters beside them.

use candle_core::Tensor;

/// The weight of a linear layer: `base` plus all `low_rank` terms. Their sum is not formed: a caller adds the products
/// of the terms to the product of the base, which is cheap and rounds nothing to the base's dtype.
#[derive(Debug, Clone)]
pub struct Weight {
    /// The stored values.
    pub base: BaseWeight,
    /// The terms that adapters add; most weights have none.
    pub low_rank: Vec<LowRank>,
}

/// The stored values of a weight, in the form in which they are multiplied. Quantised forms will be further variants,
/// which is why callers match on it.
#[derive(Debug, Clone)]
pub enum BaseWeight {
    /// A tensor in its stored dtype: (outputs, inputs), or (outputs, channels, height, width) of a convolution. It shares
    /// its storage with the source that holds it; a trained one is the variable that the optimizer updates.
    Dense(Tensor),
}

/// A low-rank term of a weight, scale · up · down, kept as its factors.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// (rank, inputs).
    pub down: Tensor,
    /// (outputs, rank).
    pub up: Tensor,
    /// What the product is multiplied by.
    pub scale: f64,
}

/// A tensor as a weight without low-rank terms.
impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Self { base: BaseWeight::Dense(tensor), low_rank: Vec::new() }
    }
}

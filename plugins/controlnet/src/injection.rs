//! [`InjectionRule`]: after which of the model's blocks each residual is added, as diffusers' `FluxTransformer2DModel` does it.

use candle_core::Tensor;
use clearform_models::families::flux::{FluxConfig, FluxControlNet, FluxResiduals};

/// The rule of one net on one model.
pub struct InjectionRule {
    double_blocks: usize,
    single_blocks: usize,
    rule: BlockRule,
}

/// How few residuals serve many double-stream blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BlockRule {
    /// Each serves as many blocks in a row: block i has residual i / ceil(blocks / residuals).
    Spread,
    /// They take turns: block i has residual i mod residuals. So do XLabs' nets, which look at pixels.
    Repeat,
}

impl InjectionRule {
    /// The rule of `net` on a model of the sizes `base`.
    pub fn new(net: &FluxControlNet, base: &FluxConfig) -> Self {
        let rule = if net.takes_pixels() { BlockRule::Repeat } else { BlockRule::Spread };
        Self { double_blocks: base.double_blocks, single_blocks: base.single_blocks, rule }
    }

    /// Each residual with the numbers of its blocks; single-stream blocks come after double-stream ones.
    pub fn place(&self, FluxResiduals { double, single }: FluxResiduals) -> Vec<(Tensor, Vec<u32>)> {
        let blocks = self.rule.blocks(double.len(), self.double_blocks, 0);
        let single_blocks = BlockRule::Spread.blocks(single.len(), self.single_blocks, self.double_blocks);
        double.into_iter().zip(blocks).chain(single.into_iter().zip(single_blocks)).collect()
    }
}

impl BlockRule {
    /// For each of `residuals`, which of `blocks` it is for, counted from `first`.
    fn blocks(self, residuals: usize, blocks: usize, first: usize) -> Vec<Vec<u32>> {
        let mut placed = vec![Vec::new(); residuals];
        if residuals == 0 {
            return placed;
        }
        let interval = blocks.div_ceil(residuals).max(1);
        for block in 0..blocks {
            let residual = if self == Self::Spread { block / interval } else { block % residuals };
            placed[residual].push((first + block) as u32);
        }
        placed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_residuals_are_spread_over_rows_of_blocks() {
        let counts: Vec<usize> = BlockRule::Spread.blocks(5, 19, 0).iter().map(Vec::len).collect();
        assert_eq!(counts, [4, 4, 4, 4, 3]);
        assert_eq!(BlockRule::Spread.blocks(2, 5, 3), [vec![3, 4, 5], vec![6, 7]]);
        assert_eq!(BlockRule::Spread.blocks(4, 5, 0), [vec![0, 1], vec![2, 3], vec![4], vec![]]);
        assert_eq!(BlockRule::Spread.blocks(0, 5, 0), Vec::<Vec<u32>>::new());
    }

    #[test]
    fn or_take_turns() {
        assert_eq!(BlockRule::Repeat.blocks(2, 5, 0), [vec![0, 2, 4], vec![1, 3]]);
    }
}

//! Which of the model's blocks each residual is added to: [`FluxInjection`] as in diffusers' `FluxTransformer2DModel`,
//! [`sd3_blocks`] as in `SD3Transformer2DModel`.

use candle_core::Tensor;
use clearform_models::families::flux::{FluxConfig, FluxControlNet, FluxResiduals};

/// The rule for one ControlNet and one FLUX model.
pub struct FluxInjection {
    double_blocks: usize,
    single_blocks: usize,
    rule: BlockRule,
}

/// How the residuals are distributed if there are fewer of them than blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BlockRule {
    /// Each residual is added to several consecutive blocks: block i gets residual i / ceil(blocks / residuals).
    Spread,
    /// The residuals repeat: block i gets residual i mod residuals. XLabs' ControlNets, which take pixels, do this.
    Repeat,
}

impl FluxInjection {
    /// The rule for `net` beside a model with the config `base`.
    pub fn new(net: &FluxControlNet, base: &FluxConfig) -> Self {
        let rule = if net.takes_pixels() { BlockRule::Repeat } else { BlockRule::Spread };
        Self { double_blocks: base.double_blocks, single_blocks: base.single_blocks, rule }
    }

    /// Each residual with the indexes of its blocks. Single-stream blocks follow the double-stream blocks.
    pub fn place(&self, FluxResiduals { double, single }: FluxResiduals) -> Vec<(Tensor, Vec<u32>)> {
        let blocks = self.rule.blocks(double.len(), self.double_blocks, 0);
        let single_blocks = BlockRule::Spread.blocks(single.len(), self.single_blocks, self.double_blocks);
        double.into_iter().zip(blocks).chain(single.into_iter().zip(single_blocks)).collect()
    }
}

impl BlockRule {
    /// The blocks of each residual, given the numbers of residuals and blocks; indexes begin at `first`.
    fn blocks(self, residuals: usize, blocks: usize, first: usize) -> Vec<Vec<u32>> {
        let mut blocks_of = vec![Vec::new(); residuals];
        if residuals == 0 {
            return blocks_of;
        }
        let interval = blocks.div_ceil(residuals).max(1);
        for block in 0..blocks {
            let residual = if self == Self::Spread { block / interval } else { block % residuals };
            blocks_of[residual].push((first + block) as u32);
        }
        blocks_of
    }
}

/// The blocks of each of `residuals` residuals in an SD3 model of `blocks` blocks: block i gets residual
/// i / (blocks / residuals), rounded down. The last block, which does not update the text, gets none.
pub fn sd3_blocks(residuals: usize, blocks: usize) -> Vec<Vec<u32>> {
    let mut blocks_of = vec![Vec::new(); residuals];
    // In f64 as Python computes it: the quotients are rounded, and then the index is.
    let interval = blocks as f64 / residuals as f64;
    for block in 0..blocks.saturating_sub(1) {
        if let Some(blocks) = blocks_of.get_mut((block as f64 / interval) as usize) {
            blocks.push(block as u32);
        }
    }
    blocks_of
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_residuals_are_spread_over_consecutive_blocks() {
        let counts: Vec<usize> = BlockRule::Spread.blocks(5, 19, 0).iter().map(Vec::len).collect();
        assert_eq!(counts, [4, 4, 4, 4, 3]);
        assert_eq!(BlockRule::Spread.blocks(2, 5, 3), [vec![3, 4, 5], vec![6, 7]]);
        assert_eq!(BlockRule::Spread.blocks(4, 5, 0), [vec![0, 1], vec![2, 3], vec![4], vec![]]);
        assert_eq!(BlockRule::Spread.blocks(0, 5, 0), Vec::<Vec<u32>>::new());
    }

    #[test]
    fn few_residuals_repeat() {
        assert_eq!(BlockRule::Repeat.blocks(2, 5, 0), [vec![0, 2, 4], vec![1, 3]]);
    }

    #[test]
    fn the_last_block_of_sd3_gets_nothing() {
        assert_eq!(sd3_blocks(2, 5), [vec![0, 1, 2], vec![3]]);
        assert_eq!(sd3_blocks(3, 5), [vec![0, 1], vec![2, 3], vec![]]);
        assert_eq!(sd3_blocks(4, 2), [vec![0], vec![], vec![], vec![]]);
        assert_eq!(sd3_blocks(0, 5), Vec::<Vec<u32>>::new());
        assert_eq!(sd3_blocks(1, 0), [Vec::<u32>::new()]);
        // SD 3.5 large with Stability's ControlNets: two blocks each, but for the last.
        let counts: Vec<usize> = sd3_blocks(19, 38).iter().map(Vec::len).collect();
        assert_eq!((counts[..18].iter().all(|count| *count == 2), counts[18]), (true, 1));
    }
}

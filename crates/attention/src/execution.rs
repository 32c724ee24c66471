//! [`Execution`]: the implementation of attention on a device, and the pairs that it computes.

use crate::tiles::LANES;
use crate::{Geometry, Policy, Radius, TileEfficiency, TokenGrid};
use candle_core::{DType, Tensor};
use clearform_kernels::clear_attention::{ListRows, SequenceLayout, TextPadding, VisitLists};

/// The implementation that computes a call of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Execution {
    /// The fused kernel for CPUs.
    Cpu,
    /// The kernels for GPUs, with tiles of 64 x 64.
    Gpu,
    /// The reference, which computes every pair.
    Plain,
}

impl Execution {
    /// The implementation for the device, dtype and head_dim of `query`, (batch, tokens, heads, head_dim).
    pub fn for_query(query: &Tensor) -> Self {
        match (query.device().is_cpu(), query.dtype(), query.dims().last()) {
            (true, DType::F16 | DType::F32 | DType::F64 | DType::BF16, _) => Self::Cpu,
            (false, DType::BF16 | DType::F16, Some(1..=128)) => Self::Gpu,
            _ => Self::Plain,
        }
    }

    /// Pairs of one call, per batch entry and head: those inside the window, and those that are computed. `text` tokens
    /// without padding.
    pub fn efficiency(self, geometry: &Geometry, policy: Policy, text: usize) -> TileEfficiency {
        let (radius, pool) = match policy {
            Policy::Full => (None, None),
            Policy::Clear { radius, pool } => (Some(radius), pool),
        };
        let image = geometry.tokens();
        let pooled = pool.map_or(0, |factor| pooled_cells(geometry, factor));
        let near = radius.map_or(square(image), |radius| pairs_inside(geometry.grids(), radius));
        let others = text * (text + image) + image * (text + pooled);
        let visited = match self {
            Self::Cpu => visited_on_cpu(geometry, radius, text, pooled),
            Self::Gpu => visited_on_gpu(geometry, radius, text, pooled),
            Self::Plain => ((text + image) * (text + image + pooled)) as u64,
        };
        TileEfficiency { inside: near + others as u64, visited }
    }
}

/// Tiles are computed for all 32 lanes, whether or not each holds a query.
fn visited_on_cpu(geometry: &Geometry, radius: Option<Radius>, text: usize, pooled: usize) -> u64 {
    let image = geometry.order().tiles.len() * LANES;
    let near = match radius {
        Some(radius) => geometry.efficiency(radius).visited,
        None => (image * geometry.tokens()) as u64,
    };
    let others = text.next_multiple_of(LANES) * (text + geometry.tokens()) + image * (text + pooled);
    near + others as u64
}

fn visited_on_gpu(geometry: &Geometry, radius: Option<Radius>, text: usize, pooled: usize) -> u64 {
    lists_on_gpu(geometry, radius, (text, pooled), ListRows::Queries).visited()
}

/// The lists that kernels of a GPU are given for `text` tokens without padding and no pooled context.
pub fn kernel_lists(geometry: &Geometry, radius: Option<Radius>, text: usize, rows: ListRows) -> VisitLists {
    lists_on_gpu(geometry, radius, (text, 0), rows)
}

fn lists_on_gpu(
    geometry: &Geometry,
    radius: Option<Radius>,
    (text, pooled): (usize, usize),
    rows: ListRows,
) -> VisitLists {
    let positions = geometry.order().positions();
    let limit = radius.map(Radius::limit);
    VisitLists::new(&SequenceLayout { text: TextPadding::Whole(text), positions: &positions, pooled, limit }, rows)
}

/// Pairs of image tokens within `radius`, compared by row and column also across grids.
fn pairs_inside(grids: &[TokenGrid], radius: Radius) -> u64 {
    let limit = i64::from(radius.limit());
    let pairs = |queries: &TokenGrid, keys: &TokenGrid| -> u64 {
        let columns = distances(queries.width, keys.width);
        let columns_near =
            |dy: i64| columns.iter().filter(move |(dx, _)| dy * dy + dx * dx < limit).map(|(_, count)| count);
        distances(queries.height, keys.height).iter().map(|(dy, count)| count * columns_near(*dy).sum::<u64>()).sum()
    };
    grids.iter().map(|queries| grids.iter().map(|keys| pairs(queries, keys)).sum::<u64>()).sum()
}

/// For each distance j - i the number of pairs of i below `a` and j below `b`.
fn distances(a: usize, b: usize) -> Vec<(i64, u64)> {
    let a = a as i64;
    let b = b as i64;
    (1 - a..b).map(|distance| (distance, (a.min(b - distance) - 0.max(-distance)) as u64)).collect()
}

/// Number of cells of pooled context.
fn pooled_cells(geometry: &Geometry, factor: usize) -> usize {
    geometry.grids().iter().map(|grid| grid.height.div_ceil(factor) * grid.width.div_ceil(factor)).sum()
}

fn square(tokens: usize) -> u64 {
    (tokens * tokens) as u64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::TileShape;
    use candle_core::Device;

    fn grid(height: usize, width: usize) -> TokenGrid {
        TokenGrid::new(height, width).unwrap()
    }

    fn radius(tokens: f64) -> Radius {
        Radius::new(tokens).unwrap()
    }

    #[test]
    fn pairs_are_counted_as_the_cpu_kernel_visits_them() {
        for grids in [vec![grid(9, 14)], vec![grid(1, 70)], vec![grid(5, 40), grid(8, 3)]] {
            let geometry = Geometry::new(grids.clone());
            for tokens in [0.5, 1.0, 3.0, 4.5, 60.0, 1e9] {
                let policy = Policy::Clear { radius: radius(tokens), pool: None };
                let efficiency = Execution::Cpu.efficiency(&geometry, policy, 0);
                assert_eq!(efficiency, geometry.efficiency(radius(tokens)), "{grids:?}, r = {tokens}");
            }
        }
    }

    #[test]
    fn whole_calls_count_text_and_pooled_context() {
        let geometry = Geometry::new(vec![grid(16, 16)]);
        let window = |pool| Policy::Clear { radius: radius(1.0), pool };
        let pairs_inside = |policy, text| Execution::Cpu.efficiency(&geometry, policy, text).inside;
        assert_eq!(pairs_inside(window(None), 0), 256);
        assert_eq!(pairs_inside(window(Some(4)), 0), 256 + 256 * 16);
        assert_eq!(pairs_inside(window(None), 3), 256 + 3 * 259 + 256 * 3);
        assert_eq!(pairs_inside(Policy::Full, 3), 259 * 259);
        let visited = |execution: Execution, policy, text| execution.efficiency(&geometry, policy, text).visited;
        assert_eq!(visited(Execution::Cpu, Policy::Full, 3), (32 + 256) * 259);
        assert_eq!(visited(Execution::Gpu, Policy::Full, 3), (64 + 256) * (64 + 256));
        assert_eq!(visited(Execution::Gpu, window(Some(4)), 3), 5 * 64 * 64 + 4 * (64 + 64 + 64) * 64);
        assert_eq!(visited(Execution::Plain, window(Some(4)), 3), 259 * (259 + 16));
    }

    #[test]
    fn gpu_tiles_match_the_published_table() {
        let geometry = Geometry::new(vec![grid(64, 64)]);
        for tokens in [8.0, 16.0] {
            let policy = Policy::Clear { radius: radius(tokens), pool: None };
            let tile = TileShape::new(8, 8).unwrap();
            let patches = TileEfficiency::of_tiles(grid(64, 64), radius(tokens), tile, tile);
            assert_eq!(Execution::Gpu.efficiency(&geometry, policy, 0), patches);
        }
    }

    #[test]
    fn the_cpu_runs_the_fused_kernel() {
        let query = |dtype| Tensor::zeros((1, 4, 1, 8), dtype, &Device::Cpu).unwrap();
        assert_eq!(Execution::for_query(&query(DType::F32)), Execution::Cpu);
        assert_eq!(Execution::for_query(&query(DType::BF16)), Execution::Cpu);
    }
}

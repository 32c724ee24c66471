//! [`Execution`]: what attention visits, on each kind of device, and the share of it that counts. It computes nothing
//! but numbers of pairs.

use crate::tiles::{LANES, Share};
use crate::{Geometry, Policy, Radius, TokenGrid};
use candle_core::{DType, Tensor};
use clearform_kernels::clear_attention::{Lists, Rows, Sequence, Text};
use std::collections::BTreeMap;
use std::ops::Range;

/// What computes an attention call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Execution {
    /// The fused kernel of the CPU.
    Cpu,
    /// The kernels of a GPU, whose tiles are 64 x 64.
    Gpu,
    /// The plain reference, which computes every pair.
    Plain,
}

impl Execution {
    /// What computes attention of queries such as `query`, (batch, tokens, heads, head_dim).
    pub fn of(query: &Tensor) -> Self {
        match (query.device().is_cpu(), query.dtype(), query.dims().last()) {
            (true, DType::F16 | DType::F32 | DType::F64 | DType::BF16, _) => Self::Cpu,
            (false, DType::BF16 | DType::F16, Some(1..=128)) => Self::Gpu,
            _ => Self::Plain,
        }
    }

    /// Pairs of one call, for each batch entry and head: those that see each other, and those that are computed. All of
    /// the `text` tokens count.
    pub fn share(self, geometry: &Geometry, policy: Policy, text: usize) -> Share {
        let (radius, pool) = match policy {
            Policy::Full => (None, None),
            Policy::Clear { radius, pool } => (Some(radius), pool),
        };
        let image = geometry.tokens();
        let pooled = pool.map_or(0, |factor| cells(geometry, factor));
        let near = radius.map_or(square(image), |radius| inside(geometry.grids(), radius));
        let others = text * (text + image) + image * (text + pooled);
        let visited = match self {
            Self::Cpu => visited_on_cpu(geometry, radius, text, pooled),
            Self::Gpu => visited_on_gpu(geometry, radius, text, pooled),
            Self::Plain => ((text + image) * (text + image + pooled)) as u64,
        };
        Share { inside: near + others as u64, visited }
    }
}

impl Share {
    /// Of pairs of image tokens within `radius`, where patches of `queries` tokens meet patches of `keys` and every pair
    /// of two patches is computed if one of them lies inside.
    pub fn of_patches(grid: TokenGrid, radius: Radius, queries: TokenGrid, keys: TokenGrid) -> Self {
        let rows = gaps(grid.height, queries.height, keys.height);
        let columns = gaps(grid.width, queries.width, keys.width);
        let limit = u64::from(radius.limit().unsigned_abs());
        let near = |row: u64| columns.iter().filter(move |(column, _)| row * row + **column * **column < limit);
        let meeting = |(row, count): (&u64, &u64)| count * near(*row).map(|(_, count)| count).sum::<u64>();
        let meetings: u64 = rows.iter().map(meeting).sum();
        Self { inside: inside(&[grid], radius), visited: meetings * (queries.tokens() * keys.tokens()) as u64 }
    }

    /// How much of what is visited lies inside, from 0 to 1.
    pub fn part(&self) -> f64 {
        self.inside as f64 / self.visited as f64
    }
}

/// Tiles of queries fill their lanes, whether all hold a query or not.
fn visited_on_cpu(geometry: &Geometry, radius: Option<Radius>, text: usize, pooled: usize) -> u64 {
    let image = geometry.order().tiles.len() * LANES;
    let near = match radius {
        Some(radius) => geometry.share_inside(radius).visited,
        None => (image * geometry.tokens()) as u64,
    };
    let others = text.next_multiple_of(LANES) * (text + geometry.tokens()) + image * (text + pooled);
    near + others as u64
}

fn visited_on_gpu(geometry: &Geometry, radius: Option<Radius>, text: usize, pooled: usize) -> u64 {
    let order = geometry.order();
    let places: Vec<(i32, i32)> = order.rows.iter().copied().zip(order.columns.iter().copied()).collect();
    let limit = radius.map(Radius::limit);
    Lists::new(&Sequence { text: Text::Whole(text), places: &places, pooled, limit }, Rows::Queries).visited()
}

/// Pairs of image tokens within `radius`; those of different grids count by their rows and columns, as everywhere.
fn inside(grids: &[TokenGrid], radius: Radius) -> u64 {
    let limit = i64::from(radius.limit());
    let pairs = |queries: &TokenGrid, keys: &TokenGrid| -> u64 {
        let columns = distances(queries.width, keys.width);
        let near = |dy: i64| columns.iter().filter(move |(dx, _)| dy * dy + dx * dx < limit).map(|(_, count)| count);
        distances(queries.height, keys.height).iter().map(|(dy, count)| count * near(*dy).sum::<u64>()).sum()
    };
    grids.iter().map(|queries| grids.iter().map(|keys| pairs(queries, keys)).sum::<u64>()).sum()
}

/// How many pairs of one of the first `a` numbers and one of the first `b` lie how far apart.
fn distances(a: usize, b: usize) -> Vec<(i64, u64)> {
    let (a, b) = (a as i64, b as i64);
    (1 - a..b).map(|distance| (distance, (a.min(b - distance) - 0.max(-distance)) as u64)).collect()
}

/// Along one side of a grid of `extent` tokens: how many runs of `queries` tokens and of `keys` lie how far apart, from
/// the nearest token of one to that of the other.
fn gaps(extent: usize, queries: usize, keys: usize) -> BTreeMap<u64, u64> {
    let runs = |length: usize| (0..extent).step_by(length).map(move |start| start..extent.min(start + length));
    let gap = |a: &Range<usize>, b: &Range<usize>| {
        let between = |left: &Range<usize>, right: &Range<usize>| (right.start + 1).saturating_sub(left.end);
        between(a, b).max(between(b, a)) as u64
    };
    let mut found = BTreeMap::new();
    for query in runs(queries) {
        runs(keys).for_each(|key| *found.entry(gap(&query, &key)).or_insert(0) += 1);
    }
    found
}

/// Cells of pooled context.
fn cells(geometry: &Geometry, factor: usize) -> usize {
    geometry.grids().iter().map(|grid| grid.height.div_ceil(factor) * grid.width.div_ceil(factor)).sum()
}

fn square(tokens: usize) -> u64 {
    (tokens * tokens) as u64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn grid(height: usize, width: usize) -> TokenGrid {
        TokenGrid::new(height, width).unwrap()
    }

    fn radius(tokens: f64) -> Radius {
        Radius::new(tokens).unwrap()
    }

    /// clear-paper.md, "Why their kernel is slow": percent at r = 8, 16 and 32. Tokens in rows are patches too.
    /// One number differs: at 512 x 512, r = 8, 16x8/8x8 the table has 26, where 25.46 is found.
    #[test]
    fn shares_of_patches_are_those_of_the_published_table() {
        let in_rows = |side: usize| grid(128usize.div_ceil(side), side.min(128));
        let table = [
            (64, [[16, 34, 63], [36, 55, 75], [28, 47, 69], [20, 47, 68], [22, 40, 64]]),
            (128, [[10, 19, 36], [35, 52, 69], [27, 44, 63], [18, 44, 61], [20, 37, 57]]),
            (256, [[5, 10, 19], [34, 51, 67], [26, 42, 60], [17, 42, 58], [20, 36, 54]]),
            (512, [[4, 8, 16], [34, 50, 66], [25, 42, 59], [17, 42, 57], [19, 35, 53]]),
        ];
        for (side, columns) in table {
            let (small, flat, large) = (grid(8, 8), grid(16, 8), grid(16, 16));
            let patches = [(in_rows(side), in_rows(side)), (small, small), (flat, small), (flat, flat), (large, small)];
            for ((queries, keys), expected) in patches.into_iter().zip(columns) {
                for (tokens, percent) in [8.0, 16.0, 32.0].into_iter().zip(expected) {
                    let share = Share::of_patches(grid(side, side), radius(tokens), queries, keys);
                    let found = (100.0 * share.part()).round() as i32;
                    assert_eq!(found, percent, "{side} x {side}, r = {tokens}, {queries:?} / {keys:?}: {share}");
                }
            }
        }
    }

    #[test]
    fn pairs_are_counted_as_the_kernel_of_the_cpu_finds_them() {
        for grids in [vec![grid(9, 14)], vec![grid(1, 70)], vec![grid(5, 40), grid(8, 3)]] {
            let geometry = Geometry::new(grids.clone());
            for tokens in [0.5, 1.0, 3.0, 4.5, 60.0, 1e9] {
                let policy = Policy::Clear { radius: radius(tokens), pool: None };
                let share = Execution::Cpu.share(&geometry, policy, 0);
                assert_eq!(share, geometry.share_inside(radius(tokens)), "{grids:?}, r = {tokens}");
            }
        }
    }

    #[test]
    fn whole_calls_count_text_and_pooled_context() {
        let geometry = Geometry::new(vec![grid(16, 16)]);
        let window = |pool| Policy::Clear { radius: radius(1.0), pool };
        let inside = |policy, text| Execution::Cpu.share(&geometry, policy, text).inside;
        assert_eq!(inside(window(None), 0), 256);
        assert_eq!(inside(window(Some(4)), 0), 256 + 256 * 16);
        assert_eq!(inside(window(None), 3), 256 + 3 * 259 + 256 * 3);
        assert_eq!(inside(Policy::Full, 3), 259 * 259);
        let visited = |execution: Execution, policy, text| execution.share(&geometry, policy, text).visited;
        assert_eq!(visited(Execution::Cpu, Policy::Full, 3), (32 + 256) * 259);
        assert_eq!(visited(Execution::Gpu, Policy::Full, 3), (64 + 256) * (64 + 256));
        assert_eq!(visited(Execution::Gpu, window(Some(4)), 3), 5 * 64 * 64 + 4 * (64 + 64 + 64) * 64);
        assert_eq!(visited(Execution::Plain, window(Some(4)), 3), 259 * (259 + 16));
    }

    #[test]
    fn tiles_of_a_gpu_are_those_of_the_published_table() {
        let geometry = Geometry::new(vec![grid(64, 64)]);
        for tokens in [8.0, 16.0] {
            let policy = Policy::Clear { radius: radius(tokens), pool: None };
            let patches = Share::of_patches(grid(64, 64), radius(tokens), grid(8, 8), grid(8, 8));
            assert_eq!(Execution::Gpu.share(&geometry, policy, 0), patches);
        }
    }

    #[test]
    fn the_cpu_runs_its_own_kernel() {
        let query = |dtype| Tensor::zeros((1, 4, 1, 8), dtype, &Device::Cpu).unwrap();
        assert_eq!(Execution::of(&query(DType::F32)), Execution::Cpu);
        assert_eq!(Execution::of(&query(DType::BF16)), Execution::Cpu);
    }
}

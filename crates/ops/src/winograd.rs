//! [`WinogradOp`]: a 3 x 3 convolution by the minimal filtering algorithm F(2 x 2, 3 x 3) (Lavin and Gray, arXiv
//! 1509.09308, section 4.1): tiles of 2 x 2 outputs cost 16 multiplications per input and output channel where the sum
//! itself costs 36. What it multiplies are sums of at most four pixels, so in f32 it is as exact as the sum.
//!
//! Of an image enlarged twofold by repeating pixels (`torch.nn.Upsample`, nearest), rows and columns of a tile are
//! a, b, b, c. One of its four points is then always 0, and 9 multiplications are left.

use crate::kernel::contiguous;
use crate::simd::{Isa, Real as _, SimdKernel, dispatch};
use crate::strided_product::block_product;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, bail};
use rayon::prelude::*;
use std::ops::Range;

/// Outputs of a tile along each side.
const TILE: usize = 2;

/// Values of the transformed input of a block, at most: 4 MiB, so that they stay in a cache of the second or third level
/// until they are multiplied.
const BLOCK_VALUES: usize = 1 << 20;

/// Tiles of a block along a row, at most: products are at the full rate from about 100 columns on.
const BLOCK_TILES: [usize; 2] = [64, 512];

/// A scale and a shift for each channel of each sample, after which SiLU follows.
#[derive(Debug, Clone, PartialEq)]
pub struct ChannelAffine {
    /// (batch, channels), row-major.
    pub scales: Vec<f32>,
    /// (batch, channels), row-major.
    pub shifts: Vec<f32>,
}

/// A convolution padded with zeros by one pixel.
#[derive(Debug, Clone, Default)]
pub(crate) struct WinogradOp {
    /// What is added to each output channel.
    pub bias: Option<Vec<f32>>,
    /// What is convolved is silu(x · scale + shift) rather than x.
    pub activation: Option<ChannelAffine>,
    /// What is convolved is enlarged twofold first.
    pub upsample: bool,
}

impl CustomOp2 for WinogradOp {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run((x, lx), (w, lw), None)
    }
}

/// The third tensor is added to the outputs.
impl CustomOp3 for WinogradOp {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        r: &CpuStorage,
        lr: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run((x, lx), (w, lw), Some((r, lr)))
    }
}

impl WinogradOp {
    fn run(
        &self,
        (x, lx): (&CpuStorage, &Layout),
        (w, lw): (&CpuStorage, &Layout),
        residual: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, inputs, height, width) = lx.shape().dims4()?;
        let outputs = lw.dims()[0];
        let enlarged = if self.upsample { 2 } else { 1 };
        let shape = (batch, outputs, height * enlarged, width * enlarged);
        let x = contiguous::<f32>(x, lx)?;
        let residual = residual.map(|(values, layout)| contiguous::<f32>(values, layout)).transpose()?;
        let filters = Filters::of(contiguous::<f32>(w, lw)?, inputs, outputs, self.upsample);
        let mut out = vec![0.0; batch * outputs * shape.2 * shape.3];
        if residual.is_some_and(|residual| residual.len() != out.len()) {
            bail!("convolution: the residual is not of the shape {shape:?} of the output");
        }
        if !out.is_empty() {
            let problem = WinogradProblem { op: self, filters, inputs, outputs, size: [height, width] };
            problem.convolve(x, residual, &mut out);
        }
        Ok((CpuStorage::F32(out), shape.into()))
    }

    /// Points of a tile along each side.
    fn points(&self) -> usize {
        points(self.upsample)
    }
}

fn points(upsample: bool) -> usize {
    if upsample { 3 } else { 4 }
}

/// The transformed weight, (points, points, outputs, inputs).
struct Filters(Vec<f32>);

impl Filters {
    /// G g Gᵀ of each kernel g.
    fn of(weight: &[f32], inputs: usize, outputs: usize, upsample: bool) -> Self {
        let points = points(upsample);
        let matrix = outputs * inputs;
        let mut filters = vec![0.0; points * points * matrix];
        for (index, kernel) in weight.as_chunks::<9>().0.iter().enumerate() {
            let row = |y: usize| filter_points([kernel[3 * y], kernel[3 * y + 1], kernel[3 * y + 2]], upsample);
            let rows = [row(0), row(1), row(2)];
            for x in 0..points {
                let column = filter_points([rows[0][x], rows[1][x], rows[2][x]], upsample);
                for y in 0..points {
                    filters[(y * points + x) * matrix + index] = column[y];
                }
            }
        }
        Self(filters)
    }
}

/// G g; of an enlarged image without the point that is always 0.
fn filter_points([a, b, c]: [f32; 3], upsample: bool) -> [f32; 4] {
    let [sum, difference] = [0.5 * (a + b + c), 0.5 * (a - b + c)];
    if upsample { [a, sum, c, 0.0] } else { [a, sum, difference, c] }
}

/// Tiles that are computed together.
struct Block {
    sample: usize,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Block {
    fn tiles(&self) -> usize {
        self.rows.len() * self.columns.len()
    }
}

struct WinogradProblem<'a> {
    op: &'a WinogradOp,
    filters: Filters,
    inputs: usize,
    outputs: usize,
    /// Height and width of x.
    size: [usize; 2],
}

/// The output, which blocks write to in parallel.
struct SharedOutput(*mut f32);

// SAFETY: blocks are disjoint, and each is written by one thread.
unsafe impl Sync for SharedOutput {}

impl SharedOutput {
    /// The output from element `start` on, which exists.
    fn from(&self, start: usize) -> Self {
        // SAFETY: the element lies within the output.
        Self(unsafe { self.0.add(start) })
    }
}

impl WinogradProblem<'_> {
    fn output_size(&self) -> [usize; 2] {
        self.size.map(|edge| if self.op.upsample { 2 * edge } else { edge })
    }

    fn convolve(&self, x: &[f32], residual: Option<&[f32]>, out: &mut [f32]) {
        let [height, width] = self.output_size();
        let samples = out.len() / (self.outputs * height * width);
        let shared = SharedOutput(out.as_mut_ptr());
        self.blocks(samples).par_iter().for_each(|block| {
            let image = &x[block.sample * self.inputs * self.size[0] * self.size[1]..];
            let transformed = self.transform_input(image, block);
            let products = self.multiply(&transformed, block.tiles());
            let start = block.sample * self.outputs * height * width;
            dispatch(StoreOutputs {
                products: &products,
                points: self.op.points(),
                block,
                outputs: self.outputs,
                size: [height, width],
                bias: self.op.bias.as_deref(),
                residual: residual.map(|residual| &residual[start..]),
                out: shared.from(start),
            });
        });
    }

    /// Blocks of about as many tiles as stay in a cache, and enough of them for all threads.
    fn blocks(&self, samples: usize) -> Vec<Block> {
        let [rows, columns] = self.output_size().map(|edge| edge.div_ceil(TILE));
        let most = BLOCK_VALUES / (self.inputs * self.op.points().pow(2)).max(1);
        let most = most.clamp(BLOCK_TILES[0], BLOCK_TILES[1]);
        let across = columns.min(most);
        let fair = rows.div_ceil(rayon::current_num_threads());
        let down = (most / across).clamp(1, fair.max(1));
        let starts = |count: usize, step: usize| (0..count).step_by(step).map(move |at| at..count.min(at + step));
        (0..samples)
            .flat_map(|sample| {
                starts(rows, down).flat_map(move |rows| {
                    starts(columns, across).map(move |columns| Block { sample, rows: rows.clone(), columns })
                })
            })
            .collect()
    }

    /// Bᵀ d B of each tile d.
    ///
    /// # Shapes
    /// x (inputs, height, width) -> (points, points, inputs, tiles).
    fn transform_input(&self, x: &[f32], block: &Block) -> Vec<f32> {
        let mut out = vec![0.0; self.op.points().pow(2) * self.inputs * block.tiles()];
        let [inputs, size] = [self.inputs, self.size[0] * self.size[1]];
        let activation = self.op.activation.as_ref().map(|activation| {
            let channels = block.sample * inputs..(block.sample + 1) * inputs;
            [&activation.scales[channels.clone()], &activation.shifts[channels]]
        });
        let image = InputImage { x: &x[..inputs * size], size: self.size, activation };
        dispatch(TransformInput { image, block, inputs, upsample: self.op.upsample, out: &mut out });
        out
    }

    /// # Shapes
    /// transformed (points, points, inputs, tiles) -> (points, points, outputs, tiles).
    fn multiply(&self, transformed: &[f32], tiles: usize) -> Vec<f32> {
        let Self { inputs, outputs, .. } = *self;
        let mut products = vec![0.0; self.op.points().pow(2) * outputs * tiles];
        let matrices = products.chunks_exact_mut(outputs * tiles);
        let filters = self.filters.0.chunks_exact(outputs * inputs);
        for ((out, filter), x) in matrices.zip(filters).zip(transformed.chunks_exact(inputs * tiles)) {
            block_product(out, [outputs, inputs, tiles], filter, x, [0.0, 1.0]);
        }
        products
    }
}

/// The image that is convolved.
#[derive(Clone, Copy)]
struct InputImage<'a> {
    x: &'a [f32],
    size: [usize; 2],
    activation: Option<[&'a [f32]; 2]>,
}

impl InputImage<'_> {
    /// Row `row` of a channel from column `first` on, activated; zeros outside of the image, whose row -1 and column -1
    /// have index 0.
    #[inline(always)]
    fn load_row<L: Isa>(&self, channel: usize, row: usize, first: usize, out: &mut [f32]) {
        let [height, width] = self.size;
        let Some(row) = row.checked_sub(1).filter(|row| *row < height) else { return out.fill(0.0) };
        let before = 1usize.saturating_sub(first).min(out.len());
        let start = (first + before - 1).min(width);
        let count = (out.len() - before).min(width - start);
        let values = &self.x[(channel * height + row) * width + start..][..count];
        out[..before].fill(0.0);
        out[before + count..].fill(0.0);
        let out = &mut out[before..before + count];
        match self.activation {
            None => out.copy_from_slice(values),
            Some([scales, shifts]) => {
                let [scale, shift] = [scales[channel], shifts[channel]];
                for (out, value) in out.iter_mut().zip(values) {
                    let value = value.times_plus::<L>(scale, shift);
                    *out = value / (1.0 + (-value).exponential::<L>());
                }
            }
        }
    }
}

/// Bᵀ d B of the tiles d of a block, for each channel.
struct TransformInput<'a> {
    image: InputImage<'a>,
    block: &'a Block,
    inputs: usize,
    upsample: bool,
    out: &'a mut [f32],
}

impl SimdKernel for TransformInput<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        if self.upsample { self.transform_enlarged::<L>() } else { self.transform::<L>() }
    }
}

impl TransformInput<'_> {
    #[inline(always)]
    fn transform<L: Isa>(self) {
        let Self { image, block, inputs, out, .. } = self;
        let columns = block.columns.len();
        let tiles = block.tiles();
        let half = columns + 1;
        let mut line = vec![0.0; 2 * half];
        // Even and odd columns apart: tile t has the even ones t and t + 1, and the odd ones t and t + 1.
        let mut rows = vec![0.0; 4 * 2 * half];
        let mut mixed = vec![0.0; 2 * half];
        for channel in 0..inputs {
            for (index, tile_row) in block.rows.clone().enumerate() {
                for (row, halves) in rows.chunks_exact_mut(2 * half).enumerate() {
                    image.load_row::<L>(channel, TILE * tile_row + row, TILE * block.columns.start, &mut line);
                    let (even, odd) = halves.split_at_mut(half);
                    for ((even, odd), pair) in even.iter_mut().zip(odd).zip(line.as_chunks::<2>().0) {
                        [*even, *odd] = *pair;
                    }
                }
                let row = |index: usize| &rows[index * 2 * half..][..2 * half];
                for (point, [first, second, sign]) in COMBINATIONS.into_iter().enumerate() {
                    combine(row(first as usize), row(second as usize), sign as f32, &mut mixed);
                    let at = |x: usize| ((4 * point + x) * inputs + channel) * tiles + index * columns;
                    let (even, odd) = mixed.split_at(half);
                    let (next_even, next_odd) = (&even[1..], &odd[1..]);
                    combine(even, next_even, -1.0, &mut out[at(0)..][..columns]);
                    combine(odd, next_even, 1.0, &mut out[at(1)..][..columns]);
                    combine(next_even, odd, -1.0, &mut out[at(2)..][..columns]);
                    combine(odd, next_odd, -1.0, &mut out[at(3)..][..columns]);
                }
            }
        }
    }

    #[inline(always)]
    fn transform_enlarged<L: Isa>(self) {
        let Self { image, block, inputs, out, .. } = self;
        let columns = block.columns.len();
        let tiles = block.tiles();
        let length = columns + 2;
        let mut rows = vec![0.0; 3 * length];
        let mut mixed = vec![0.0; length];
        for channel in 0..inputs {
            for (index, tile_row) in block.rows.clone().enumerate() {
                for (row, line) in rows.chunks_exact_mut(length).enumerate() {
                    image.load_row::<L>(channel, tile_row + row, block.columns.start, line);
                }
                let row = |index: usize| &rows[index * length..][..length];
                for (point, [first, second, sign]) in ENLARGED_COMBINATIONS.into_iter().enumerate() {
                    combine(row(first as usize), row(second as usize), sign as f32, &mut mixed);
                    for (x, [first, second, sign]) in ENLARGED_COMBINATIONS.into_iter().enumerate() {
                        let at = ((3 * point + x) * inputs + channel) * tiles + index * columns;
                        let [a, b] = [&mixed[first as usize..], &mixed[second as usize..]];
                        combine(a, b, sign as f32, &mut out[at..][..columns]);
                    }
                }
            }
        }
    }
}

/// Rows of Bᵀ: point = d[first] + sign · d[second].
const COMBINATIONS: [[i8; 3]; 4] = [[0, 2, -1], [1, 2, 1], [2, 1, -1], [1, 3, -1]];

/// out = a + sign · b.
#[inline(always)]
fn combine(a: &[f32], b: &[f32], sign: f32, out: &mut [f32]) {
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out = a + sign * b;
    }
}

/// As [`COMBINATIONS`], of a, b, b, c: a - b, b + b and b - c.
const ENLARGED_COMBINATIONS: [[i8; 3]; 3] = [[0, 1, -1], [1, 1, 1], [1, 2, -1]];

/// Aᵀ m A of the products m of each tile, with bias and residual.
struct StoreOutputs<'a> {
    /// (points, points, outputs, tiles).
    products: &'a [f32],
    points: usize,
    block: &'a Block,
    outputs: usize,
    /// Height and width of the output.
    size: [usize; 2],
    bias: Option<&'a [f32]>,
    /// (outputs, height, width).
    residual: Option<&'a [f32]>,
    /// (outputs, height, width).
    out: SharedOutput,
}

impl SimdKernel for StoreOutputs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let [height, width] = self.size;
        let columns = self.block.columns.len();
        let first = TILE * self.block.columns.start;
        let count = (TILE * columns).min(width - first);
        let mut sums = vec![0.0; self.points * columns];
        let mut line = vec![0.0; TILE * columns];
        for output in 0..self.outputs {
            let bias = self.bias.map_or(0.0, |bias| bias[output]);
            for (index, tile_row) in self.block.rows.clone().enumerate() {
                for y in (0..TILE).filter(|y| TILE * tile_row + y < height) {
                    self.add_rows(output, index, y, &mut sums);
                    interleave(&sums, columns, bias, &mut line);
                    let start = (output * height + TILE * tile_row + y) * width + first;
                    if let Some(residual) = self.residual {
                        line.iter_mut().zip(&residual[start..start + count]).for_each(|(out, value)| *out += value);
                    }
                    // SAFETY: row and columns lie within the output, and no other block has them.
                    let out = unsafe { std::slice::from_raw_parts_mut(self.out.0.add(start), count) };
                    out.copy_from_slice(&line[..count]);
                }
            }
        }
    }
}

impl StoreOutputs<'_> {
    /// Row `y` of Aᵀ m, for each column of points.
    #[inline(always)]
    fn add_rows(&self, output: usize, index: usize, y: usize, sums: &mut [f32]) {
        let columns = self.block.columns.len();
        let tiles = self.block.tiles();
        for (x, sums) in sums.chunks_exact_mut(columns).enumerate() {
            let row = |point: usize| {
                &self.products[((point * self.points + x) * self.outputs + output) * tiles + index * columns..]
                    [..columns]
            };
            match (self.points, y) {
                (3, 0) => combine(row(0), row(1), 1.0, sums),
                (3, _) => combine(row(1), row(2), -1.0, sums),
                (_, 0) => combine_three([row(0), row(1), row(2)], 1.0, sums),
                (_, _) => combine_three([row(1), row(2), row(3)], -1.0, sums),
            }
        }
    }
}

/// out = a + sign · (b + c).
#[inline(always)]
fn combine_three([a, b, c]: [&[f32]; 3], sign: f32, out: &mut [f32]) {
    for (((out, a), b), c) in out.iter_mut().zip(a).zip(b).zip(c) {
        *out = a + sign * (b + c);
    }
}

/// The two outputs of each tile, side by side.
#[inline(always)]
fn interleave(sums: &[f32], columns: usize, bias: f32, line: &mut [f32]) {
    let pairs = line.as_chunks_mut::<2>().0;
    let point = |index: usize| &sums[index * columns..][..columns];
    if sums.len() == 3 * columns {
        for (((pair, a), b), c) in pairs.iter_mut().zip(point(0)).zip(point(1)).zip(point(2)) {
            *pair = [a + b + bias, b - c + bias];
        }
    } else {
        let points = point(0).iter().zip(point(1)).zip(point(2)).zip(point(3));
        for (pair, (((a, b), c), d)) in pairs.iter_mut().zip(points) {
            *pair = [a + b + c + bias, b - c - d + bias];
        }
    }
}

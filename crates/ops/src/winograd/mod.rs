//! [`WinogradOp`]: a 3 x 3 convolution by the minimal filtering algorithm F(2 x 2, 3 x 3) (Lavin and Gray, arXiv
//! 1509.09308, section 4.1): tiles of 2 x 2 outputs cost 16 multiplications per input and output channel where the sum
//! itself costs 36. What it multiplies are sums of at most four pixels, so in f32 it is as exact as the sum.
//!
//! Of an image enlarged twofold by repeating pixels (`torch.nn.Upsample`, nearest), rows and columns of a tile are
//! a, b, b, c. One of its four points is then always 0, and 9 multiplications are left.
//!
//! In bf16 what is multiplied is rounded after it was transformed, and sums stay in f32.

mod input;
mod lane;
mod output;

use crate::gemm::PackInputRows;
use crate::kernel::contiguous;
use crate::simd::{Bf16Pair, CpuFeatures, dispatch};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, bail};
use input::{InputImage, TransformInput};
use lane::WinogradLane;
use output::StoreOutputs;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Outputs of a tile along each side.
const TILE: usize = 2;

/// Values of the transformed input of a block, at most: 4 MiB, so that they stay in a cache of the second or third level
/// until they are multiplied.
const BLOCK_VALUES: usize = 1 << 20;

/// Tiles of a block, at least and at most: products are at the full rate from about 100 columns on.
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
    /// Products are those of bf16, where the processor has instructions for them.
    pub bf16: bool,
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
        let weight = contiguous::<f32>(w, lw)?;
        let mut out = vec![0.0; batch * outputs * shape.2 * shape.3];
        if residual.is_some_and(|residual| residual.len() != out.len()) {
            bail!("convolution: the residual is not of the shape {shape:?} of the output");
        }
        let sizes = Sizes { inputs, outputs, image: [height, width] };
        match self.bf16 && CpuFeatures::detect().has_bf16_dot() {
            _ if out.is_empty() => {}
            true => WinogradProblem::<Bf16Pair>::new(self, sizes, weight).convolve(x, residual, &mut out),
            false => WinogradProblem::<f32>::new(self, sizes, weight).convolve(x, residual, &mut out),
        }
        Ok((CpuStorage::F32(out), shape.into()))
    }

    /// Points of a tile along each side.
    fn points(&self) -> usize {
        points(self.upsample)
    }
}

fn points(upsample: bool) -> usize {
    filter_rows(upsample).len()
}

/// Rows of G; of an enlarged image without the point that is always 0.
fn filter_rows(upsample: bool) -> &'static [[f32; 3]] {
    const ROWS: [[f32; 3]; 4] = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]];
    const ENLARGED_ROWS: [[f32; 3]; 3] = [ROWS[0], ROWS[1], ROWS[3]];
    if upsample { &ENLARGED_ROWS } else { &ROWS }
}

/// One point, of the rows y and x of G, of each kernel g: y g xᵀ.
///
/// # Shapes
/// weight (outputs, inputs, 3, 3) -> (outputs, inputs).
fn filter_point(weight: &[f32], y: [f32; 3], x: [f32; 3]) -> Vec<f32> {
    let point = |kernel: &[f32; 9]| {
        let column = |column: usize| y[0] * kernel[column] + y[1] * kernel[3 + column] + y[2] * kernel[6 + column];
        x[0] * column(0) + x[1] * column(1) + x[2] * column(2)
    };
    weight.as_chunks::<9>().0.iter().map(point).collect()
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

#[derive(Clone, Copy)]
struct Sizes {
    inputs: usize,
    outputs: usize,
    /// Height and width of x.
    image: [usize; 2],
}

struct WinogradProblem<'a, F> {
    op: &'a WinogradOp,
    sizes: Sizes,
    /// The transformed weight, (points, points, outputs, lanes of inputs).
    filters: Vec<F>,
    /// Memory of the threads, which take it for a block and put it back.
    spaces: Mutex<Vec<Space<F>>>,
}

/// What a thread needs to compute a block.
#[derive(Default)]
struct Space<F> {
    transformed: Vec<F>,
    products: Vec<f32>,
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

impl<'a, F: WinogradLane> WinogradProblem<'a, F> {
    fn new(op: &'a WinogradOp, sizes: Sizes, weight: &[f32]) -> Self {
        let Sizes { inputs, outputs, .. } = sizes;
        let rows = filter_rows(op.upsample);
        let mut filters = vec![F::default(); rows.len().pow(2) * outputs * inputs.div_ceil(F::WIDTH)];
        let points = filters.par_chunks_mut(outputs * inputs.div_ceil(F::WIDTH)).enumerate();
        points.for_each(|(point, out)| {
            let values = filter_point(weight, rows[point / rows.len()], rows[point % rows.len()]);
            dispatch(PackInputRows { rows: &values, inputs, out });
        });
        Self { op, sizes, filters, spaces: Mutex::default() }
    }

    fn output_size(&self) -> [usize; 2] {
        self.sizes.image.map(|edge| if self.op.upsample { 2 * edge } else { edge })
    }

    fn convolve(&self, x: &[f32], residual: Option<&[f32]>, out: &mut [f32]) {
        let [height, width] = self.output_size();
        let samples = out.len() / (self.sizes.outputs * height * width);
        let shared = SharedOutput(out.as_mut_ptr());
        self.blocks(samples).par_iter().for_each(|block| {
            let mut space = self.spaces().pop().unwrap_or_default();
            let transformed = self.transform(x, block, &mut space.transformed);
            let products = self.multiply(transformed, block.tiles(), &mut space.products);
            let start = block.sample * self.sizes.outputs * height * width;
            dispatch(StoreOutputs {
                products,
                step: F::padded(block.tiles()),
                points: self.op.points(),
                block,
                outputs: self.sizes.outputs,
                size: [height, width],
                bias: self.op.bias.as_deref(),
                residual: residual.map(|residual| &residual[start..]),
                out: shared.from(start),
            });
            self.spaces().push(space);
        });
    }

    fn spaces(&self) -> std::sync::MutexGuard<'_, Vec<Space<F>>> {
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks of about as many tiles as stay in a cache, and enough of them for all threads.
    fn blocks(&self, samples: usize) -> Vec<Block> {
        let [rows, columns] = self.output_size().map(|edge| edge.div_ceil(TILE));
        let most = BLOCK_VALUES / (self.sizes.inputs * self.op.points().pow(2)).max(1);
        let most = most.clamp(BLOCK_TILES[0], BLOCK_TILES[1]);
        // Whole rows where they are not too long: short ones are read slowly, since each is in another page.
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

    /// Bᵀ d B of each tile d of a block of x, as [`TransformInput::out`].
    fn transform<'s>(&self, x: &[f32], block: &Block, space: &'s mut Vec<F>) -> &'s [F] {
        let Sizes { inputs, image: size, .. } = self.sizes;
        let strip = F::strip(block.tiles());
        let count = self.op.points().pow(2) * inputs.div_ceil(F::WIDTH) * F::padded(block.tiles());
        space.resize(count, F::default());
        let pixels = size[0] * size[1];
        let activation = self.op.activation.as_ref().map(|activation| {
            let channels = block.sample * inputs..(block.sample + 1) * inputs;
            [&activation.scales[channels.clone()], &activation.shifts[channels]]
        });
        let image = InputImage { x: &x[block.sample * inputs * pixels..][..inputs * pixels], size, activation };
        dispatch(TransformInput { image, block, inputs, upsample: self.op.upsample, strip, out: space });
        space
    }

    /// # Shapes
    /// transformed as [`TransformInput::out`] -> (points, points, outputs, tiles), rows of tiles being
    /// [`WinogradLane::padded`].
    fn multiply<'s>(&self, transformed: &[F], tiles: usize, space: &'s mut Vec<f32>) -> &'s [f32] {
        let Sizes { inputs, outputs, .. } = self.sizes;
        let lanes = inputs.div_ceil(F::WIDTH);
        let padded = F::padded(tiles);
        space.resize(self.op.points().pow(2) * outputs * padded, 0.0);
        let matrices = space.chunks_exact_mut(outputs * padded).zip(transformed.chunks_exact(lanes * padded));
        for ((out, x), filter) in matrices.zip(self.filters.chunks_exact(outputs * lanes)) {
            F::multiply(filter, x, out, outputs);
        }
        space
    }
}

/// out = a + sign · b.
#[inline(always)]
fn combine(a: &[f32], b: &[f32], sign: f32, out: &mut [f32]) {
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out = a + sign * b;
    }
}

//! [`TransformInput`]: Bᵀ d B of the tiles d of a block.

use super::lane::WinogradLane;
use super::{Block, TILE, combine};
use crate::simd::{Isa, Real as _, SimdKernel};

/// The image that is convolved.
#[derive(Clone, Copy)]
pub(super) struct InputImage<'a> {
    /// (inputs, height, width).
    pub x: &'a [f32],
    pub size: [usize; 2],
    /// A scale and a shift of each channel.
    pub activation: Option<[&'a [f32]; 2]>,
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
pub(super) struct TransformInput<'a, F> {
    pub image: InputImage<'a>,
    pub block: &'a Block,
    pub inputs: usize,
    pub upsample: bool,
    /// Tiles of a strip.
    pub strip: usize,
    /// (points, points, strips, lanes of inputs, tiles of a strip). Tiles that fill up the last strip are left as they are.
    pub out: &'a mut [F],
}

/// How points follow from the pixels of a row of tiles. Along a line of pixels, where it begins is what differs.
struct Scheme {
    /// Lines of pixels that a row of tiles reads.
    lines: usize,
    /// Lines from a row of tiles to the next.
    step: usize,
    /// Pixels of a line.
    pixels: usize,
    /// Rows of Bᵀ: point = d[first] + sign · d[second].
    combinations: &'static [[i8; 3]],
    /// Where in a line the first pixel, the second and so on of its tiles begin.
    starts: [usize; 4],
}

/// Rows of Bᵀ.
const COMBINATIONS: [[i8; 3]; 4] = [[0, 2, -1], [1, 2, 1], [2, 1, -1], [1, 3, -1]];
/// Of a, b, b, c: a - b, b + b and b - c.
const ENLARGED_COMBINATIONS: [[i8; 3]; 3] = [[0, 1, -1], [1, 1, 1], [1, 2, -1]];

impl Scheme {
    /// Of a row of `columns` tiles.
    fn new(columns: usize, upsample: bool) -> Self {
        if upsample {
            let combinations = &ENLARGED_COMBINATIONS;
            return Self { lines: 3, step: 1, pixels: columns + 2, combinations, starts: [0, 1, 2, 0] };
        }
        // Even and odd columns apart: tile t has the even ones t and t + 1, and the odd ones t and t + 1.
        let half = columns + 1;
        Self { lines: 4, step: TILE, pixels: 2 * half, combinations: &COMBINATIONS, starts: [0, half, 1, half + 1] }
    }
}

impl<F: WinogradLane> SimdKernel for TransformInput<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(mut self) {
        let columns = self.block.columns.len();
        let scheme = Scheme::new(columns, self.upsample);
        let mut lines = vec![0.0; F::WIDTH * scheme.lines * scheme.pixels];
        let mut mixed = vec![0.0; F::WIDTH * scheme.pixels];
        let mut points = vec![0.0; F::WIDTH * columns];
        let mut pixels = vec![0.0; scheme.pixels];
        for lane in 0..self.inputs.div_ceil(F::WIDTH) {
            for row in 0..self.block.rows.len() {
                for (part, lines) in lines.chunks_exact_mut(scheme.lines * scheme.pixels).enumerate() {
                    match lane * F::WIDTH + part {
                        channel if channel < self.inputs => {
                            self.read_lines::<L>(channel, row, &scheme, lines, &mut pixels);
                        }
                        _ => lines.fill(0.0),
                    }
                }
                for (y, [first, second, sign]) in scheme.combinations.iter().enumerate() {
                    let parts = mixed.chunks_exact_mut(scheme.pixels);
                    for (mixed, lines) in parts.zip(lines.chunks_exact(scheme.lines * scheme.pixels)) {
                        let line = |index: i8| &lines[index as usize * scheme.pixels..][..scheme.pixels];
                        combine(line(*first), line(*second), f32::from(*sign), mixed);
                    }
                    for (x, [first, second, sign]) in scheme.combinations.iter().enumerate() {
                        let parts = points.chunks_exact_mut(columns);
                        for (points, mixed) in parts.zip(mixed.chunks_exact(scheme.pixels)) {
                            let pixels = |index: i8| &mixed[scheme.starts[index as usize]..][..columns];
                            combine(pixels(*first), pixels(*second), f32::from(*sign), points);
                        }
                        self.store(&points, y * scheme.combinations.len() + x, lane, row);
                    }
                }
            }
        }
    }
}

impl<F: WinogradLane> TransformInput<'_, F> {
    /// Reads the lines of a row of tiles; `lines` has those that the row before has read. `pixels` is space for one.
    #[inline(always)]
    fn read_lines<L: Isa>(&self, channel: usize, row: usize, scheme: &Scheme, lines: &mut [f32], pixels: &mut [f32]) {
        let shared = if row == 0 { 0 } else { scheme.lines - scheme.step };
        lines.copy_within((scheme.lines - shared) * scheme.pixels.., 0);
        let [first_row, first_column] =
            [self.block.rows.start + row, self.block.columns.start].map(|tile| tile * scheme.step);
        for (index, line) in lines.chunks_exact_mut(scheme.pixels).enumerate().skip(shared) {
            if self.upsample {
                self.image.load_row::<L>(channel, first_row + index, first_column, line);
                continue;
            }
            self.image.load_row::<L>(channel, first_row + index, first_column, pixels);
            let (even, odd) = line.split_at_mut(scheme.pixels / 2);
            for ((even, odd), pair) in even.iter_mut().zip(odd).zip(pixels.as_chunks::<2>().0) {
                [*even, *odd] = *pair;
            }
        }
    }

    /// Packs the values of a point of one row of tiles.
    #[inline(always)]
    fn store(&mut self, points: &[f32], point: usize, lane: usize, row: usize) {
        let columns = self.block.columns.len();
        let strips = F::padded(self.block.tiles()) / self.strip;
        let lanes = self.inputs.div_ceil(F::WIDTH);
        let (first, second) = points.split_at(columns);
        let mut done = 0;
        while done < columns {
            let tile = row * columns + done;
            let count = (self.strip - tile % self.strip).min(columns - done);
            let at = ((point * strips + tile / self.strip) * lanes + lane) * self.strip + tile % self.strip;
            let part = done..done + count;
            F::pack_two_rows(&first[part.clone()], second.get(part), &mut self.out[at..at + count]);
            done += count;
        }
    }
}

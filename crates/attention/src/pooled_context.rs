//! Pooled context: keys and values of the image, averaged over cells by learned weights, in plain tensor algebra.

use crate::{Geometry, TokenGrid};
use candle_core::{DType, Device, Result, Tensor};

/// Initial weights of a pooled cell, which take the mean.
///
/// # Shapes
/// -> (1, 1, 1, d, 1, d, 1).
pub(crate) fn initial_weight(factor: usize, device: &Device) -> Result<Tensor> {
    let mean = 1.0 / (factor * factor) as f64;
    Tensor::full(mean as f32, &[1, 1, 1, factor, 1, factor, 1], device)
}

/// Averages tokens over d × d cells, grid by grid. Cells that reach over the border use the weights of the tokens
/// inside, scaled by (sum of all weights) / (sum of their weights).
///
/// # Shapes
/// x (batch, image tokens, heads, head_dim) in tile order, weight (1, 1, 1, d, 1, d, 1) -> (batch, cells, heads,
/// head_dim).
pub(crate) fn pooled(x: &Tensor, weight: &Tensor, geometry: &Geometry) -> Result<Tensor> {
    let (batch, _, heads, head_dim) = x.dims4()?;
    // Sums of many tokens in bf16 would lose most of their digits.
    let work = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let raster = geometry.to_raster(x)?.flatten_from(2)?.to_dtype(work)?; // (batch, image tokens, channels)
    let weight = weight.to_device(x.device())?.to_dtype(work)?;
    let weight = weight.reshape((weight.dim(3)?, weight.dim(5)?))?;
    let mut first = 0;
    let mut cells = Vec::with_capacity(geometry.grids().len());
    for grid in geometry.grids() {
        cells.push(pooled_grid(&raster.narrow(1, first, grid.tokens())?, &weight, *grid)?);
        first += grid.tokens();
    }
    let cells = Tensor::cat(&cells, 1)?;
    cells.reshape((batch, cells.dim(1)?, heads, head_dim))?.to_dtype(x.dtype())
}

/// x (batch, height · width, channels), weight (d, d) -> (batch, cells, channels).
fn pooled_grid(x: &Tensor, weight: &Tensor, grid: TokenGrid) -> Result<Tensor> {
    let (batch, _, channels) = x.dims3()?;
    let factor = weight.dim(0)?;
    let rows = grid.height.div_ceil(factor);
    let columns = grid.width.div_ceil(factor);
    let padded = padded(&x.reshape((batch, grid.height, grid.width, channels))?, factor)?;
    let cells = padded.reshape((batch * rows, factor, columns, factor * channels))?;
    let weights = weight.unsqueeze(2)?.broadcast_as((factor, factor, channels))?;
    let weights = weights.reshape((1, factor, 1, factor * channels))?;
    let sums = cells.broadcast_mul(&weights)?.sum(1)?; // (batch · rows, columns, d · channels)
    let sums = sums.reshape((batch, rows * columns, factor, channels))?.sum(2)?;
    sums.broadcast_mul(&border_scale(weight, grid)?)
}

/// (sum of all weights) / (sum of the weights of existing tokens), (1, cells, 1).
fn border_scale(weight: &Tensor, grid: TokenGrid) -> Result<Tensor> {
    let factor = weight.dim(0)?;
    let rows = grid.height.div_ceil(factor);
    let columns = grid.width.div_ceil(factor);
    let present = padded(&Tensor::ones((1, grid.height, grid.width, 1), weight.dtype(), weight.device())?, factor)?;
    let present = present.reshape((rows, factor, columns, factor))?;
    let sums = present.broadcast_mul(&weight.reshape((1, factor, 1, factor))?)?.sum((1, 3))?;
    weight.sum_all()?.broadcast_div(&sums)?.reshape((1, rows * columns, 1))
}

/// Zeros below and to the right of x (batch, height, width, channels), up to multiples of `factor`.
fn padded(x: &Tensor, factor: usize) -> Result<Tensor> {
    let missing = |size: usize| size.next_multiple_of(factor) - size;
    let (_, height, width, _) = x.dims4()?;
    x.pad_with_zeros(1, 0, missing(height))?.pad_with_zeros(2, 0, missing(width))
}

//! Position embeddings: [`rotary_tables`] (RoPE) and [`sincos_positions`] (sinusoidal, added to tokens).

use crate::Result;
use candle_core::{Device, Tensor};
use std::collections::HashMap;

/// The base of both kinds of frequencies.
const THETA: f64 = 10000.0;

/// Cosines and sines of the rotary angles (RoFormer, section 3.2.2; `FluxPosEmbed`): channel pair i of an axis of d
/// channels has the angle id / 10000^(2i/d). Computed in f64, as diffusers does, and rounded at the end.
///
/// # Shapes
/// ids (tokens, axes) -> (cos, sin), each (tokens, head_dim / 2) in f32.
pub(crate) fn rotary_tables(ids: &[Vec<f64>], axes: &[usize], device: &Device) -> Result<(Tensor, Tensor)> {
    let pairs = axes.iter().sum::<usize>() / 2;
    let table = |function: fn(f64) -> f64| {
        // Cached, since a grid has far fewer rows and columns than tokens.
        let mut known = HashMap::new();
        let mut values: Vec<f32> = Vec::with_capacity(ids.len() * pairs);
        for (id, axis) in ids.iter().flat_map(|id| id.iter().zip(axes)) {
            let compute = || rotary_angles(*id, *axis).map(|angle| function(angle) as f32).collect::<Vec<_>>();
            values.extend_from_slice(known.entry((id.to_bits(), *axis)).or_insert_with(compute));
        }
        Tensor::from_vec(values, (ids.len(), pairs), device)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

/// diffusers' `get_2d_sincos_pos_embed` (after MAE, arXiv 2111.06377): sines and cosines of each token's column, then
/// of its row. Any grid spans the coordinates 0 to `base` / `interpolation_scale`.
///
/// # Shapes
/// The result is (1, rows · columns, channels) in f32, in raster order.
pub(crate) fn sincos_positions(
    (rows, columns): (usize, usize),
    channels: usize,
    base: usize,
    interpolation_scale: f64,
    device: &Device,
) -> Result<Tensor> {
    // Each division rounds to f32, as in diffusers.
    let embed_axis = |count: usize| -> Vec<Vec<f32>> {
        let spacing = (count as f64 / base as f64) as f32;
        let coordinate = |index: usize| f64::from(index as f32 / spacing / interpolation_scale as f32);
        (0..count).map(|index| sincos_embedding(coordinate(index), channels / 2).collect()).collect()
    };
    let embedded_rows = embed_axis(rows);
    let embedded_columns = embed_axis(columns);
    let mut values = Vec::with_capacity(rows * columns * channels);
    for row in &embedded_rows {
        for column in &embedded_columns {
            values.extend_from_slice(column);
            values.extend_from_slice(row);
        }
    }
    Ok(Tensor::from_vec(values, (1, rows * columns, channels), device)?)
}

fn rotary_angles(id: f64, axis: usize) -> impl Iterator<Item = f64> {
    (0..axis / 2).map(move |pair| id / THETA.powf((2 * pair) as f64 / axis as f64))
}

/// diffusers' `get_1d_sincos_pos_embed_from_grid`: sines, then cosines, of `coordinate` / 10000^(2i/channels).
fn sincos_embedding(coordinate: f64, channels: usize) -> impl Iterator<Item = f32> {
    let half = channels / 2;
    let angle = move |index: usize| coordinate / THETA.powf(index as f64 / half as f64);
    (0..half).map(move |index| angle(index).sin() as f32).chain((0..half).map(move |index| angle(index).cos() as f32))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn columns_come_before_rows_and_span_the_base() {
        let table = sincos_positions((2, 4), 8, 4, 2.0, &Device::Cpu).unwrap().squeeze(0).unwrap();
        let token = table.to_vec2::<f32>().unwrap().remove(6); // row 1, column 2
        let column = 2.0f64 / 2.0;
        let row = 1.0f64 / 0.5 / 2.0;
        let wanted = [column, row]
            .map(|coordinate| {
                [coordinate.sin(), (coordinate / 100.0).sin(), coordinate.cos(), (coordinate / 100.0).cos()]
            })
            .concat()
            .into_iter()
            .map(|value| value as f32)
            .collect::<Vec<_>>();
        assert_eq!(token, wanted);
    }

    #[test]
    fn each_axis_has_the_angles_of_its_own_id() {
        let (cos, sin) = rotary_tables(&[vec![0.0, 2.0, 5.0]], &[2, 2, 4], &Device::Cpu).unwrap();
        let cos = cos.to_vec2::<f32>().unwrap().remove(0);
        let sin = sin.to_vec2::<f32>().unwrap().remove(0);
        let angles = [0.0f64, 2.0, 5.0, 5.0 / 100.0];
        assert_eq!(cos, angles.map(|angle| angle.cos() as f32));
        assert_eq!(sin, angles.map(|angle| angle.sin() as f32));
    }
}

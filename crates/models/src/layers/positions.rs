//! [`rotary_tables`], which turn queries and keys, and [`sincos_positions`], which are added to tokens.

use crate::Result;
use candle_core::{Device, Tensor};
use std::collections::HashMap;

/// Base of the frequencies of both.
const THETA: f64 = 10000.0;

/// Cosines and sines of the rotary angles, f64 until the last step (RoFormer, section 3.2.2): channel pair i of an axis
/// of d channels turns by id / 10000^(2i/d).
///
/// # Shapes
/// `ids` holds (tokens, axes) -> (cos, sin), each (tokens, head_dim / 2) in f32.
pub(crate) fn rotary_tables(ids: &[Vec<f64>], axes: &[usize], device: &Device) -> Result<(Tensor, Tensor)> {
    let pairs = axes.iter().sum::<usize>() / 2;
    let table = |function: fn(f64) -> f64| {
        // Rows and columns are few, tokens are many.
        let mut known = HashMap::new();
        let mut values: Vec<f32> = Vec::with_capacity(ids.len() * pairs);
        for (id, axis) in ids.iter().flat_map(|id| id.iter().zip(axes)) {
            let turned = || turn(*id, *axis).map(|angle| function(angle) as f32).collect::<Vec<_>>();
            values.extend_from_slice(known.entry((id.to_bits(), *axis)).or_insert_with(turned));
        }
        Tensor::from_vec(values, (ids.len(), pairs), device)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

/// Sines and cosines of each token's column, then of its row (diffusers' `get_2d_sincos_pos_embed`, after MAE): whatever
/// the grid, its rows and columns span `base` places, divided by `interpolation`.
///
/// # Shapes
/// The result is (1, rows · columns, channels), f32, in raster order.
pub(crate) fn sincos_positions(
    (rows, columns): (usize, usize),
    channels: usize,
    base: usize,
    interpolation: f64,
    device: &Device,
) -> Result<Tensor> {
    // Each division rounds to f32, as there. Rows and columns are few, tokens are many.
    let along = |count: usize| -> Vec<Vec<f32>> {
        let spacing = (count as f64 / base as f64) as f32;
        let place = |place: usize| f64::from(place as f32 / spacing / interpolation as f32);
        (0..count).map(|index| sincos(place(index), channels / 2).collect()).collect()
    };
    let (down, across) = (along(rows), along(columns));
    let mut values = Vec::with_capacity(rows * columns * channels);
    for row in &down {
        for column in &across {
            values.extend_from_slice(column);
            values.extend_from_slice(row);
        }
    }
    Ok(Tensor::from_vec(values, (1, rows * columns, channels), device)?)
}

fn turn(id: f64, axis: usize) -> impl Iterator<Item = f64> {
    (0..axis / 2).map(move |pair| id / THETA.powf((2 * pair) as f64 / axis as f64))
}

/// Sines, then cosines, of `place` at frequencies that fall geometrically from 1.
fn sincos(place: f64, channels: usize) -> impl Iterator<Item = f32> {
    let half = channels / 2;
    let angle = move |index: usize| place / THETA.powf(index as f64 / half as f64);
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
        let (column, row) = (2.0f64 / 2.0, 1.0f64 / 0.5 / 2.0);
        let wanted = [column, row]
            .map(|place| [place.sin(), (place / 100.0).sin(), place.cos(), (place / 100.0).cos()])
            .concat()
            .into_iter()
            .map(|value| value as f32)
            .collect::<Vec<_>>();
        assert_eq!(token, wanted);
    }

    #[test]
    fn tables_turn_each_axis_by_its_own_id() {
        let (cos, sin) = rotary_tables(&[vec![0.0, 2.0, 5.0]], &[2, 2, 4], &Device::Cpu).unwrap();
        let cos = cos.to_vec2::<f32>().unwrap().remove(0);
        let sin = sin.to_vec2::<f32>().unwrap().remove(0);
        let angles = [0.0f64, 2.0, 5.0, 5.0 / 100.0];
        assert_eq!(cos, angles.map(|angle| angle.cos() as f32));
        assert_eq!(sin, angles.map(|angle| angle.sin() as f32));
    }
}

//! Converts the ids of image tokens (`img_ids`) to the token grids that they describe.

use crate::{ModelError, Result};
use candle_core::{DType, Tensor};
use clearform_attention::TokenGrid;

/// Two spacings are equal if they differ by less than this fraction. Ids may be f32 multiples of a fraction.
const SPACING_TOLERANCE: f64 = 1e-3;

/// The rows of an id tensor, in f64.
///
/// # Shapes
/// (tokens, 3), or (batch, tokens, 3), of which the first sample is used (older versions of diffusers have a batch).
pub(super) fn read_ids(name: &str, ids: &Tensor) -> Result<Vec<Vec<f64>>> {
    let ids = if ids.rank() == 3 { ids.get(0)? } else { ids.clone() };
    match ids.dims() {
        [_, 3] => Ok(ids.to_dtype(DType::F64)?.to_vec2()?),
        other => Err(ModelError::bad_input(name, format!("expected shape (tokens, 3), found {other:?}"))),
    }
}

/// The grids of the image tokens. Each run of tokens with the same column 0 is a grid; columns 1 and 2 are its rows and
/// columns in raster order, evenly spaced from any origin.
pub(super) fn grids(ids: &[Vec<f64>]) -> Result<Vec<TokenGrid>> {
    let mut first = 0;
    let mut grids = Vec::new();
    if ids.is_empty() {
        return Err(ModelError::bad_input("img_ids", "there are no image tokens"));
    }
    for run in ids.chunk_by(|previous, next| previous[0] == next[0]) {
        grids.push(grid(run, first)?);
        first += run.len();
    }
    Ok(grids)
}

/// The grid of one run of ids. `first` is the index of its first token, for error messages.
fn grid(run: &[Vec<f64>], first: usize) -> Result<TokenGrid> {
    let width = run.iter().take_while(|id| id[1] == run[0][1]).count();
    let bad_token = |token: usize, reason: &str| {
        let id = run.get(token).map_or(&[][..], Vec::as_slice);
        let remedy = "image tokens must be a full grid in raster order: column 1 the row, column 2 the column";
        ModelError::bad_input("img_ids", format!("token {} has id {id:?}: {reason}; {remedy}", first + token))
    };
    if width == 0 || run.iter().flatten().any(|id| !id.is_finite()) {
        return Err(bad_token(0, "an id of its grid is not a finite number"));
    }
    if !run.len().is_multiple_of(width) {
        return Err(bad_token(run.len() - 1, &format!("{} tokens do not fill rows of {width}", run.len())));
    }
    for (token, id) in run.iter().enumerate() {
        if id[1] != run[token - token % width][1] || id[2] != run[token % width][2] {
            return Err(bad_token(token, "its row or column is not that of its neighbours"));
        }
    }
    let rows: Vec<f64> = run.iter().step_by(width).map(|id| id[1]).collect();
    let columns: Vec<f64> = run[..width].iter().map(|id| id[2]).collect();
    match (uneven(&rows), uneven(&columns)) {
        (Some(row), _) => Err(bad_token(row * width, "its row does not follow the row before")),
        (_, Some(column)) => Err(bad_token(column, "its column does not follow the column before")),
        _ => TokenGrid::new(rows.len(), width).map_err(|error| ModelError::bad_input("img_ids", error.to_string())),
    }
}

/// The first index where the coordinates are not evenly spaced and increasing.
fn uneven(coordinates: &[f64]) -> Option<usize> {
    let spacing = coordinates.get(1)? - coordinates[0];
    let is_even = |pair: &[f64]| spacing > 0.0 && ((pair[1] - pair[0]) / spacing - 1.0).abs() < SPACING_TOLERANCE;
    coordinates.windows(2).position(|pair| !is_even(pair)).map(|index| index + 1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ids(tokens: &[(usize, usize, usize)]) -> Vec<Vec<f64>> {
        tokens.iter().map(|(grid, row, column)| vec![*grid as f64, *row as f64, *column as f64]).collect()
    }

    fn full(grid: usize, height: usize, width: usize) -> Vec<(usize, usize, usize)> {
        (0..height * width).map(|token| (grid, token / width, token % width)).collect()
    }

    #[test]
    fn column_0_separates_grids() {
        let tokens = [full(0, 5, 8), full(1, 3, 2)].concat();
        let expected = [TokenGrid::new(5, 8).unwrap(), TokenGrid::new(3, 2).unwrap()];
        assert_eq!(grids(&ids(&tokens)).unwrap(), expected);
    }

    #[test]
    fn grids_may_have_an_offset_and_any_spacing() {
        let stretched: Vec<Vec<f64>> =
            ids(&full(0, 4, 3)).iter().map(|id| vec![0.0, id[1] * 0.75 + 7.0, id[2] * 0.75]).collect();
        assert_eq!(grids(&stretched).unwrap(), [TokenGrid::new(4, 3).unwrap()]);
    }

    #[test]
    fn errors_name_the_token_that_breaks_the_grid() {
        let cases = [
            (full(0, 4, 3)[..11].to_vec(), "token 10 has id [0.0, 3.0, 1.0]: 11 tokens do not fill rows of 3"),
            (
                [full(0, 2, 2), vec![(0, 3, 0), (0, 3, 1)]].concat(),
                "token 4 has id [0.0, 3.0, 0.0]: its row does not follow",
            ),
            (vec![(0, 0, 0), (0, 0, 2), (0, 0, 3)], "token 2 has id [0.0, 0.0, 3.0]: its column does not follow"),
            (vec![(0, 0, 1), (0, 0, 0)], "its column does not follow"),
            (vec![(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0)], "token 2 has id [0.0, 1.0, 1.0]: its row or column"),
            ([full(3, 2, 2), vec![(4, 0, 0), (4, 0, 0)]].concat(), "token 5 has id [4.0, 0.0, 0.0]"),
        ];
        for (tokens, expected) in cases {
            let error = grids(&ids(&tokens)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = grids(&[vec![0.0, f64::NAN, 0.0]]).unwrap_err().to_string();
        assert!(error.contains("token 0 has id [0.0, NaN, 0.0]: an id of its grid is not a finite number"), "{error}");
    }
}

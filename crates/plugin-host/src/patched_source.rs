//! [`PatchedSource`]: a source of tensors as adapters edit it. The source itself is never changed, so taking an adapter away
//! gives back the very bits that were there.

use crate::adapter::{Edit, EditKind, EditValues};
use crate::weight_edits::{PlacedEdit, WeightEdits};
use crate::{PluginError, Result};
use candle_core::{D, DType, Tensor};
use clearform_weights::{InMemoryTensors, LowRank, RawTensor, TensorInfo, TensorSource, WeightsError};
use std::collections::BTreeMap;
use std::ops::Range;

/// How low-rank edits meet a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LowRankMode {
    /// Beside it, for whoever can add their products: costs little, and loses nothing to a weight's number format.
    #[default]
    Beside,
    /// Added to it.
    Fused,
}

/// A source with the edits of one part of a pipeline.
pub struct PatchedSource<'a, S> {
    source: S,
    edits: Option<&'a BTreeMap<String, Vec<PlacedEdit>>>,
    mode: LowRankMode,
}

impl<'a, S: TensorSource> PatchedSource<'a, S> {
    /// `source` as `changes` edit the part `name`.
    pub fn new(source: S, edits: &'a WeightEdits, part: &str, mode: LowRankMode) -> Self {
        Self { source, edits: edits.of(part), mode }
    }

    fn edits(&self, name: &str) -> &'a [PlacedEdit] {
        self.edits.and_then(|edits| edits.get(name)).map_or(&[], Vec::as_slice)
    }

    fn edited(&self, name: &str) -> Result<Tensor> {
        let stored = self.source.tensor(name)?;
        let mut tensor = stored.to_dtype(DType::F32)?;
        for change in self.edits(name) {
            tensor = change.apply(&tensor)?;
        }
        Ok(tensor.to_dtype(stored.dtype())?)
    }

    fn describe(&self, mut info: TensorInfo) -> TensorInfo {
        let columns = self.edits(&info.name).iter().map(|change| change.columns).max();
        if let ([_, own], Some(columns)) = (&mut info.shape[..], columns) {
            *own = columns.max(*own);
        }
        info
    }
}

impl<S: TensorSource> TensorSource for PatchedSource<'_, S> {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.source.tensors().into_iter().map(|info| self.describe(info)).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        Some(self.describe(self.source.info(name)?))
    }

    fn read(&self, name: &str) -> clearform_weights::Result<RawTensor> {
        match self.edits(name) {
            [] => self.source.read(name),
            _ => InMemoryTensors::from_iter([(name.to_owned(), self.tensor(name)?)]).read(name),
        }
    }

    fn read_range(&self, name: &str, range: Range<usize>) -> clearform_weights::Result<Vec<u8>> {
        match self.edits(name) {
            [] => self.source.read_range(name, range),
            _ => InMemoryTensors::from_iter([(name.to_owned(), self.tensor(name)?)]).read_range(name, range),
        }
    }

    fn tensor(&self, name: &str) -> clearform_weights::Result<Tensor> {
        match self.edits(name) {
            [] => self.source.tensor(name),
            _ => self.edited(name).map_err(|error| explain(name, error)),
        }
    }

    fn low_rank_terms(&self, name: &str) -> clearform_weights::Result<(Tensor, Vec<LowRank>)> {
        let edits = self.edits(name);
        if edits.is_empty() || self.mode == LowRankMode::Fused || !edits.iter().all(PlacedEdit::is_plain) {
            return Ok((self.tensor(name)?, Vec::new()));
        }
        let weight = self.source.tensor(name)?;
        let (rows, columns) = weight.dims2()?;
        if edits.iter().any(|change| change.columns != columns) {
            return Ok((self.tensor(name)?, Vec::new()));
        }
        let terms = edits.iter().map(|change| change.term(rows, &weight)).collect::<Result<Vec<_>>>();
        Ok((weight, terms.map_err(|error| explain(name, error))?))
    }
}

fn explain(name: &str, error: PluginError) -> WeightsError {
    match error {
        PluginError::Weights(error) => error,
        PluginError::Tensor(error) => WeightsError::Tensor(error),
        other => WeightsError::BadTensor { name: name.to_owned(), reason: other.to_string() },
    }
}

impl PlacedEdit {
    fn edit(&self) -> &Edit {
        &self.adapter.edits()[self.edit]
    }

    /// Whether it is low-rank, as far as can be told without its tensors.
    fn is_plain(&self) -> bool {
        self.edit().kind == EditKind::LowRank && !self.edit().decomposed
    }

    /// The whole edit as a term beside a weight of `rows`, in its number format and place.
    fn term(&self, rows: usize, weight: &Tensor) -> Result<LowRank> {
        let (EditValues::LowRank { down, up }, _) = self.adapter.values(self.edit)? else {
            return Err(self.adapter.bad(self.edit(), "it is low-rank, but has no factors"));
        };
        let up = spread(&matrix(&up)?, &self.pieces, rows)?;
        let like = |factor: Tensor| factor.to_dtype(weight.dtype())?.to_device(weight.device());
        Ok(LowRank { down: like(matrix(&down)?)?, up: like(up)?, scale: self.strength * self.edit().scale })
    }

    /// The edited tensor, in f32.
    fn apply(&self, tensor: &Tensor) -> Result<Tensor> {
        let (values, magnitude) = self.adapter.values(self.edit)?;
        let in_f32 = |tensor: &Tensor, device| matrix(tensor)?.to_dtype(DType::F32)?.to_device(device);
        let values = match values {
            EditValues::LowRank { down, up } => {
                EditValues::LowRank { down: in_f32(&down, tensor.device())?, up: in_f32(&up, tensor.device())? }
            }
            EditValues::Value(value) => EditValues::Value(in_f32(&value, tensor.device())?),
        };
        let magnitude =
            magnitude.map(|magnitude| magnitude.to_dtype(DType::F32)?.to_device(tensor.device())).transpose()?;
        let widened = widen(tensor, self.columns)?;
        let weight = widened.reshape((widened.dims().first().copied().unwrap_or(1), ()))?;
        let edited = over_rows(&weight, &self.pieces, |rows, from| {
            let edited = self.edit_rows(&rows, &values, from)?;
            let edited = match &magnitude {
                Some(magnitude) => self.decomposed(&edited, magnitude, from)?,
                None => edited,
            };
            // At full strength a replacement is the very value that was given.
            if self.strength == 1.0 { Ok(edited) } else { Ok((&rows + ((edited - &rows)? * self.strength)?)?) }
        })?;
        Ok(edited.reshape(widened.shape())?)
    }

    /// Rows of a weight, edited at full strength. Another adapter may have widened them.
    ///
    /// # Shapes
    /// weight (rows, columns), of which the edit's tensors have the rows `from` -> as weight.
    fn edit_rows(&self, weight: &Tensor, values: &EditValues, from: &Range<usize>) -> Result<Tensor> {
        let Edit { kind, scale, extents, .. } = self.edit();
        let of_rows = |tensor: &Tensor| tensor.reshape((extents[0], ()))?.narrow(0, from.start, from.len());
        let plus = |delta: Tensor| -> Result<Tensor> { Ok((weight + widen(&(delta * *scale)?, weight.dim(1)?)?)?) };
        match (values, kind) {
            (EditValues::LowRank { down, up }, _) => plus(of_rows(up)?.contiguous()?.matmul(down)?),
            (EditValues::Value(value), EditKind::Scale) => Ok(weight.broadcast_mul(&of_rows(value)?)?),
            (EditValues::Value(value), EditKind::Replace) => Ok(of_rows(value)?),
            (EditValues::Value(value), _) => plus(of_rows(value)?),
        }
    }

    /// The rows of `moved` with the norms of `magnitude` in place of their own (DoRA, arXiv 2402.09353, eq. 5); or its
    /// columns, where the magnitude has one for each of them.
    fn decomposed(&self, moved: &Tensor, magnitude: &Tensor, from: &Range<usize>) -> Result<Tensor> {
        let [rows, columns] = self.edit().extents;
        let by_row = magnitude.elem_count() == rows && !(magnitude.dims().len() == 2 && magnitude.dims()[0] == 1);
        if by_row {
            let wanted = magnitude.reshape((rows, 1))?.narrow(0, from.start, from.len())?;
            let norms = moved.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
            return Ok(moved.broadcast_mul(&(wanted / norms)?)?);
        }
        if magnitude.elem_count() != columns || from.len() != rows {
            let found = magnitude.dims();
            let reason =
                format!("its magnitude {found:?} fits neither {rows} rows nor {columns} columns that lie together");
            return Err(self.adapter.bad(self.edit(), &reason));
        }
        let norms = moved.sqr()?.sum_keepdim(0)?.sqrt()?;
        Ok(moved.broadcast_mul(&(magnitude.reshape((1, columns))? / norms)?)?)
    }
}

/// `weight` with `edit` done to the rows of each piece.
///
/// # Shapes
/// (rows, columns) -> the same.
fn over_rows(
    weight: &Tensor,
    pieces: &[(Range<usize>, usize)],
    edit: impl Fn(Tensor, &Range<usize>) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut pieces: Vec<&(Range<usize>, usize)> = pieces.iter().collect();
    pieces.sort_by_key(|(_, to)| *to);
    let (mut parts, mut done) = (Vec::new(), 0);
    for (from, to) in pieces {
        if *to > done {
            parts.push(weight.narrow(0, done, to - done)?);
        }
        parts.push(edit(weight.narrow(0, *to, from.len())?, from)?);
        done = to + from.len();
    }
    if done < weight.dim(0)? {
        parts.push(weight.narrow(0, done, weight.dim(0)? - done)?);
    }
    Ok(Tensor::cat(&parts, 0)?)
}

/// # Shapes
/// (rows, ..) -> (rows, all others together).
fn matrix(tensor: &Tensor) -> candle_core::Result<Tensor> {
    tensor.reshape((tensor.dims().first().copied().unwrap_or(1), ()))
}

/// Zeros beside the columns of a matrix, so that there are `columns`.
fn widen(tensor: &Tensor, columns: usize) -> Result<Tensor> {
    match tensor.dims() {
        [_, own] if *own < columns => Ok(tensor.pad_with_zeros(1, 0, columns - own)?),
        _ => Ok(tensor.clone()),
    }
}

/// The rows of `tensor` where `pieces` say, and zeros elsewhere.
///
/// # Shapes
/// (edited rows, n) -> (rows, n).
fn spread(tensor: &Tensor, pieces: &[(Range<usize>, usize)], rows: usize) -> Result<Tensor> {
    if let [(from, 0)] = pieces
        && from.len() == rows
    {
        return Ok(tensor.narrow(0, from.start, rows)?.contiguous()?);
    }
    let mut spread = Tensor::zeros((rows, tensor.dim(1)?), tensor.dtype(), tensor.device())?;
    for (from, to) in pieces {
        spread = spread.slice_scatter0(&tensor.narrow(0, from.start, from.len())?.contiguous()?, *to)?;
    }
    Ok(spread)
}

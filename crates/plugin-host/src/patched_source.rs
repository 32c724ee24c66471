//! [`PatchedSource`]: a tensor source with the edits of adapters applied as tensors are read. The underlying source
//! never changes, so without the adapter the model has exactly the same bits as before.

use crate::edit::{Edit, EditKind, EditValues};
use crate::weight_edits::{EditedRows, PlacedEdit, WeightEdits};
use crate::{PluginError, Result};
use candle_core::{D, DType, Device, Tensor};
use clearform_weights::{
    BaseWeight, InMemoryTensors, LowRank, QuantizedMatrix, RawTensor, TensorInfo, TensorSource, Weight, WeightsError,
};
use std::borrow::Borrow;
use std::ops::Range;
use std::sync::Arc;

/// How low-rank edits are applied to a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LowRankMode {
    /// The factors stay separate, and their product with the input is added at run time. This costs little, and nothing
    /// is rounded to the weight's dtype.
    #[default]
    Separate,
    /// The product of the factors is added to the weight.
    Fused,
}

/// A source with the edits of one component of a pipeline, which it borrows or shares.
#[derive(Clone)]
pub struct PatchedSource<S, E = Arc<WeightEdits>> {
    source: S,
    edits: E,
    component: String,
    mode: LowRankMode,
}

impl<S: TensorSource, E: Borrow<WeightEdits>> PatchedSource<S, E> {
    /// Applies the edits of `component` to `source`.
    pub fn new(source: S, edits: E, component: &str, mode: LowRankMode) -> Self {
        Self { source, edits, component: component.to_owned(), mode }
    }

    fn edits(&self, name: &str) -> &[PlacedEdit] {
        let edits = self.edits.borrow().component(&self.component);
        edits.and_then(|edits| edits.get(name)).map_or(&[], Vec::as_slice)
    }

    /// Whether every edit of the tensor `name` is a low-rank term to keep beside it.
    fn keeps_terms(&self, name: &str) -> bool {
        let columns = self.source.info(name).map(|info| info.shape.iter().skip(1).product::<usize>());
        let is_term = |edit: &PlacedEdit| edit.is_low_rank_term() && Some(edit.columns) <= columns;
        self.mode == LowRankMode::Separate && self.edits(name).iter().all(is_term)
    }

    fn edited(&self, name: &str) -> Result<Tensor> {
        let stored = self.source.tensor(name)?;
        let dtype = stored.dtype();
        Ok(self.with_edits(stored, self.edits(name))?.to_dtype(dtype)?)
    }

    /// `stored` with some of its edits, in f32.
    fn with_edits(&self, stored: Tensor, edits: &[PlacedEdit]) -> Result<Tensor> {
        let mut tensor = stored.to_dtype(DType::F32)?;
        for edit in edits {
            tensor = edit.apply(&tensor, || self.column_norms(edit))?;
        }
        Ok(tensor)
    }

    /// The norms of the columns of the whole parameter that `edit` edits, before they are set (DoRA). A fused parameter
    /// is several tensors here, each of which may have had other edits before.
    ///
    /// # Shapes
    /// The result is (columns).
    fn column_norms(&self, edit: &PlacedEdit) -> Result<Tensor> {
        let mut squares: Option<Tensor> = None;
        for part in edit.whole.iter() {
            let edits = self.edits(&part.canonical);
            let before = edits.iter().position(|other| other.is_same(edit)).unwrap_or(edits.len());
            let stored = self.source.tensor(&part.canonical)?;
            let weight = self.with_edits(stored, &edits[..before])?;
            let sum = edit.column_squares(&weight, &part.rows)?;
            squares = Some(match squares {
                Some(others) => (others + sum)?,
                None => sum,
            });
        }
        let squares = squares.ok_or_else(|| edit.adapter.edit_error(edit.edit(), "it sets norms of no rows"))?;
        Ok(squares.sqrt()?)
    }

    fn describe(&self, mut info: TensorInfo) -> TensorInfo {
        let columns = self.edits(&info.name).iter().map(|edit| edit.columns).max();
        if let ([_, stored], Some(columns)) = (&mut info.shape[..], columns) {
            *stored = columns.max(*stored);
        }
        info
    }
}

impl<S: TensorSource, E: Borrow<WeightEdits> + Send + Sync> TensorSource for PatchedSource<S, E> {
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
            _ => self.edited(name).map_err(|error| weights_error(name, error)),
        }
    }

    fn weight(&self, name: &str) -> clearform_weights::Result<Weight> {
        if !self.keeps_terms(name) {
            return self.tensor(name).map(Weight::from);
        }
        let mut weight = self.source.weight(name)?;
        for edit in self.edits(name) {
            let term = edit.low_rank_term(&weight.base).map_err(|error| weights_error(name, error))?;
            weight.low_rank.push(term);
        }
        Ok(weight)
    }

    fn quantized_rows(&self, name: &str, rows: Range<usize>) -> clearform_weights::Result<Option<QuantizedMatrix>> {
        match self.edits(name) {
            [] => self.source.quantized_rows(name, rows),
            _ => Ok(None),
        }
    }
}

fn weights_error(name: &str, error: PluginError) -> WeightsError {
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

    /// Whether the edit only adds a low-rank term.
    fn is_low_rank_term(&self) -> bool {
        self.edit().kind == EditKind::LowRank && !self.edit().decomposed
    }

    /// The edit as a term for `weight`, on its device.
    fn low_rank_term(&self, weight: &BaseWeight) -> Result<LowRank> {
        let (EditValues::LowRank { down, up }, _) = self.adapter.values(self.edit)? else {
            return Err(self.adapter.edit_error(self.edit(), "it is low-rank, but has no factors"));
        };
        let shape = weight.shape();
        let up = scatter_rows(&matrix(&up)?, &self.rows, shape.first().copied().unwrap_or(1))?;
        let down = widen(&matrix(&down)?, shape.iter().skip(1).product())?;
        let like_weight = |factor: Tensor| factor.to_dtype(weight.term_dtype())?.to_device(weight.device());
        let scale = self.strength * self.edit().scale;
        Ok(LowRank { down: like_weight(down)?, up: like_weight(up)?, scale })
    }

    fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.adapter, &other.adapter) && self.edit == other.edit
    }

    /// The edited tensor, in f32. `column_norms` are those of the whole parameter before they are set.
    fn apply(&self, tensor: &Tensor, column_norms: impl Fn() -> Result<Tensor>) -> Result<Tensor> {
        let (values, magnitude) = self.values_in_f32(tensor.device())?;
        let widened = widen(tensor, self.columns)?;
        let weight = matrix(&widened)?;
        let magnitude = magnitude.map(|magnitude| self.magnitude(&magnitude, &widened, column_norms)).transpose()?;
        let edited = map_rows(&weight, &self.rows, |rows, from| {
            let edited = self.edit_rows(&rows, &values, from)?;
            let edited = match &magnitude {
                Some(Magnitude::OfRows(wanted)) => set_row_norms(&edited, &wanted.narrow(0, from.start, from.len())?)?,
                Some(Magnitude::OfColumns(factors)) => edited.broadcast_mul(factors)?,
                None => edited,
            };
            // At full strength the difference is not formed, so that a replacement keeps its exact values.
            if self.strength == 1.0 { Ok(edited) } else { Ok((&rows + ((edited - &rows)? * self.strength)?)?) }
        })?;
        Ok(edited.reshape(widened.shape())?)
    }

    /// The edit's tensors as matrices, and its magnitude; in f32 on `device`.
    fn values_in_f32(&self, device: &Device) -> Result<(EditValues, Option<Tensor>)> {
        let (values, magnitude) = self.adapter.values(self.edit)?;
        let in_f32 = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.to_device(device);
        let values = match values {
            EditValues::LowRank { down, up } => {
                EditValues::LowRank { down: in_f32(&matrix(&down)?)?, up: in_f32(&matrix(&up)?)? }
            }
            EditValues::Value(value) => EditValues::Value(in_f32(&matrix(&value)?)?),
        };
        Ok((values, magnitude.as_ref().map(in_f32).transpose()?))
    }

    /// Some rows of a weight, edited at full strength. They may be wider than the edit, if another adapter widened
    /// them.
    ///
    /// # Shapes
    /// weight (rows, columns), for the rows `from` of the edit's tensors -> as weight.
    fn edit_rows(&self, weight: &Tensor, values: &EditValues, from: &Range<usize>) -> Result<Tensor> {
        let Edit { kind, scale, shape, .. } = self.edit();
        let select_rows = |tensor: &Tensor| tensor.reshape((shape[0], ()))?.narrow(0, from.start, from.len());
        let add = |delta: Tensor| -> Result<Tensor> { Ok((weight + widen(&(delta * *scale)?, weight.dim(1)?)?)?) };
        match (values, kind) {
            (EditValues::LowRank { down, up }, _) => add(select_rows(up)?.contiguous()?.matmul(down)?),
            (EditValues::Value(value), EditKind::Scale) => Ok(weight.broadcast_mul(&select_rows(value)?)?),
            (EditValues::Value(value), EditKind::Replace) => Ok(select_rows(value)?),
            (EditValues::Value(value), _) => add(select_rows(value)?),
        }
    }

    /// The magnitude of the edit (DoRA, arXiv 2402.09353, eq. 5) for `weight`, whose rows may be a part of the
    /// parameter's.
    fn magnitude(
        &self,
        magnitude: &Tensor,
        weight: &Tensor,
        column_norms: impl Fn() -> Result<Tensor>,
    ) -> Result<Magnitude> {
        let rows = self.edit().shape[0];
        let count = magnitude.elem_count();
        if count == rows && (magnitude.rank() < 2 || magnitude.dim(0)? == rows) {
            return Ok(Magnitude::OfRows(magnitude.reshape((rows, 1))?));
        }
        let [channels, columns] = [weight.dims().get(1).copied().unwrap_or(1), self.columns];
        if count != channels || count == 0 {
            let found = magnitude.dims();
            let reason = format!("expected a magnitude for {rows} rows or {channels} columns, found {found:?}");
            return Err(self.adapter.edit_error(self.edit(), &reason));
        }
        // A channel of a convolution is several columns with one norm.
        let norms = column_norms()?.reshape((channels, ()))?.sqr()?.sum_keepdim(1)?.sqrt()?;
        let factors = (magnitude.reshape((channels, 1))? / norms)?;
        Ok(Magnitude::OfColumns(factors.broadcast_as((channels, columns / channels))?.reshape((1, columns))?))
    }

    /// The sums of the squares of the columns of some rows of `weight`, edited at full strength.
    ///
    /// # Shapes
    /// weight (rows, ..) -> (columns).
    fn column_squares(&self, weight: &Tensor, rows: &[EditedRows]) -> Result<Tensor> {
        let (values, _) = self.values_in_f32(weight.device())?;
        let weight = matrix(&widen(weight, self.columns)?)?;
        let squares = rows.iter().map(|EditedRows { from, to }| -> Result<Tensor> {
            let edited = self.edit_rows(&weight.narrow(0, *to, from.len())?, &values, from)?;
            Ok(edited.sqr()?.sum_keepdim(0)?)
        });
        Ok(Tensor::cat(&squares.collect::<Result<Vec<_>>>()?, 0)?.sum(0)?)
    }
}

/// The norms that an edit sets.
enum Magnitude {
    /// The norm of each row, (rows, 1).
    OfRows(Tensor),
    /// What each column is multiplied by to have its norm, (1, columns).
    OfColumns(Tensor),
}

/// Rescales rows to norms.
///
/// # Shapes
/// weight (rows, columns), norms (rows, 1) -> as weight.
fn set_row_norms(weight: &Tensor, norms: &Tensor) -> Result<Tensor> {
    let found = weight.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    Ok(weight.broadcast_mul(&(norms / found)?)?)
}

/// `weight` with `edit` applied to the given rows.
///
/// # Shapes
/// (rows, columns) -> the same.
fn map_rows(
    weight: &Tensor,
    rows: &[EditedRows],
    edit: impl Fn(Tensor, &Range<usize>) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut sorted: Vec<&EditedRows> = rows.iter().collect();
    sorted.sort_by_key(|rows| rows.to);
    let mut parts = Vec::new();
    let mut done = 0;
    for EditedRows { from, to } in sorted {
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
/// (rows, ..) -> (rows, product of the other dimensions).
fn matrix(tensor: &Tensor) -> candle_core::Result<Tensor> {
    tensor.reshape((tensor.dims().first().copied().unwrap_or(1), ()))
}

/// Pads a matrix with zeros on the right to `columns` columns.
fn widen(tensor: &Tensor, columns: usize) -> Result<Tensor> {
    match tensor.dims() {
        [_, found] if *found < columns => Ok(tensor.pad_with_zeros(1, 0, columns - found)?),
        _ => Ok(tensor.clone()),
    }
}

/// The rows of `tensor` at their places in a matrix of `count` rows that is zero elsewhere.
///
/// # Shapes
/// (edited rows, n) -> (count, n).
fn scatter_rows(tensor: &Tensor, rows: &[EditedRows], count: usize) -> Result<Tensor> {
    if let [EditedRows { from, to: 0 }] = rows
        && from.len() == count
    {
        return Ok(tensor.narrow(0, from.start, count)?.contiguous()?);
    }
    let mut scattered = Tensor::zeros((count, tensor.dim(1)?), tensor.dtype(), tensor.device())?;
    for EditedRows { from, to } in rows {
        scattered = scattered.slice_scatter0(&tensor.narrow(0, from.start, from.len())?.contiguous()?, *to)?;
    }
    Ok(scattered)
}

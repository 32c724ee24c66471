//! [`PrefixView`]: the tensors of a source whose names have a prefix, under their names without it.

use candle_core::{DType, Device, Tensor};
use clearform_weights::{InMemoryTensors, QuantizedMatrix, RawTensor, Result, TensorInfo, TensorSource, WeightsError};
use std::collections::BTreeSet;
use std::ops::Range;

/// The largest identity matrix that is made, 256 MB in f32. Text encoders have projections of at most 1280 rows; the
/// number of rows comes from the file.
const MOST_ROWS: usize = 8192;

/// The tensors of a source with a prefix.
#[derive(Debug)]
pub struct PrefixView<S> {
    source: S,
    prefix: String,
    /// Tensors of the source that are not listed.
    hidden: BTreeSet<String>,
    /// Tensors that the source does not have.
    added: InMemoryTensors,
}

impl<S: TensorSource> PrefixView<S> {
    /// All tensors of `source` with `prefix`.
    pub(crate) fn new(source: S, prefix: &str) -> Self {
        Self { source, prefix: prefix.to_owned(), hidden: BTreeSet::new(), added: InMemoryTensors::default() }
    }

    /// Hides the tensors `names`.
    pub(crate) fn without<'a>(mut self, names: impl Iterator<Item = &'a String>) -> Self {
        self.hidden = names.filter(|name| self.source.info(&self.with_prefix(name)).is_some()).cloned().collect();
        self
    }

    /// Adds the identity matrix as `name`, with as many rows and the dtype of the tensor `like`, if there is one.
    pub(crate) fn with_identity(mut self, name: &str, like: &str) -> Result<Self> {
        let like = self.source.info(&self.with_prefix(like));
        let rows = like.as_ref().and_then(|like| like.shape.first().copied()).filter(|rows| *rows <= MOST_ROWS);
        if let (Some(like), Some(rows)) = (like, rows) {
            let dtype = DType::try_from(like.dtype).unwrap_or(DType::F32);
            let identity = Tensor::eye(rows, DType::F32, &Device::Cpu)?.to_dtype(dtype)?;
            self.added.insert(name, identity);
        }
        Ok(self)
    }

    /// The tensors of the source that are not listed.
    pub(crate) fn hidden(&self) -> impl Iterator<Item = &str> {
        self.hidden.iter().map(String::as_str)
    }

    fn with_prefix(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The name of `name` in the source; an error if it is hidden.
    fn in_source(&self, name: &str) -> Result<String> {
        match self.hidden.contains(name) {
            true => Err(WeightsError::Missing { name: name.to_owned() }),
            false => Ok(self.with_prefix(name)),
        }
    }
}

impl<S: TensorSource> TensorSource for PrefixView<S> {
    fn tensors(&self) -> Vec<TensorInfo> {
        let visible = self.source.tensors().into_iter().filter_map(|info| {
            let name = info.name.strip_prefix(&self.prefix).filter(|name| !self.hidden.contains(*name))?;
            Some(TensorInfo { name: name.to_owned(), ..info })
        });
        let mut tensors: Vec<_> = visible.filter(|info| self.added.info(&info.name).is_none()).collect();
        tensors.extend(self.added.tensors());
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        tensors
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let info = self.added.info(name).or_else(|| self.source.info(&self.in_source(name).ok()?));
        info.map(|info| TensorInfo { name: name.to_owned(), ..info })
    }

    fn read(&self, name: &str) -> Result<RawTensor> {
        match self.added.info(name) {
            Some(_) => self.added.read(name),
            None => self.source.read(&self.in_source(name)?),
        }
    }

    fn read_range(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        match self.added.info(name) {
            Some(_) => self.added.read_range(name, range),
            None => self.source.read_range(&self.in_source(name)?, range),
        }
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        match self.added.info(name) {
            Some(_) => self.added.tensor(name),
            None => self.source.tensor(&self.in_source(name)?),
        }
    }

    fn quantized_rows(&self, name: &str, rows: Range<usize>) -> Result<Option<QuantizedMatrix>> {
        match self.added.info(name) {
            Some(_) => Ok(None),
            None => self.source.quantized_rows(&self.in_source(name)?, rows),
        }
    }
}

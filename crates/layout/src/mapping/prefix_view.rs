//! [`PrefixView`]: those tensors of a source whose names begin alike, without that beginning.

use candle_core::{DType, Device, Tensor};
use clearform_weights::{InMemoryTensors, RawTensor, Result, TensorInfo, TensorSource, WeightsError};
use std::collections::BTreeSet;
use std::ops::Range;

/// More rows than the projection of any text encoder has; a larger identity is not made.
const MOST_ROWS: usize = 8192;

/// The tensors of a source under a prefix.
#[derive(Debug)]
pub struct PrefixView<S> {
    source: S,
    prefix: String,
    hidden: BTreeSet<String>,
    added: InMemoryTensors,
}

impl<S: TensorSource> PrefixView<S> {
    /// All tensors of `source` under `prefix`.
    pub(crate) fn new(source: S, prefix: &str) -> Self {
        Self { source, prefix: prefix.to_owned(), hidden: BTreeSet::new(), added: InMemoryTensors::default() }
    }

    /// Without these of them.
    pub(crate) fn without<'a>(mut self, names: impl Iterator<Item = &'a String>) -> Self {
        self.hidden = names.filter(|name| self.source.info(&self.whole(name)).is_some()).cloned().collect();
        self
    }

    /// With the identity as `name`, of as many rows and in the same number format as `like`, if that is there.
    pub(crate) fn with_identity(mut self, name: &str, like: &str) -> Result<Self> {
        let like = self.source.info(&self.whole(like));
        let rows = like.as_ref().and_then(|like| like.shape.first().copied()).filter(|rows| *rows <= MOST_ROWS);
        if let (Some(like), Some(rows)) = (like, rows) {
            let dtype = DType::try_from(like.dtype).unwrap_or(DType::F32);
            let identity = Tensor::eye(rows, DType::F32, &Device::Cpu)?.to_dtype(dtype)?;
            self.added.insert(name, identity);
        }
        Ok(self)
    }

    /// The tensors that are there but not shown.
    pub(crate) fn hidden(&self) -> impl Iterator<Item = &str> {
        self.hidden.iter().map(String::as_str)
    }

    fn whole(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn check_shown(&self, name: &str) -> Result<String> {
        match self.hidden.contains(name) {
            true => Err(WeightsError::Missing { name: name.to_owned() }),
            false => Ok(self.whole(name)),
        }
    }
}

impl<S: TensorSource> TensorSource for PrefixView<S> {
    fn tensors(&self) -> Vec<TensorInfo> {
        let own = self.source.tensors().into_iter().filter_map(|info| {
            let name = info.name.strip_prefix(&self.prefix).filter(|name| !self.hidden.contains(*name))?;
            Some(TensorInfo { name: name.to_owned(), ..info })
        });
        let mut tensors: Vec<_> = own.filter(|info| self.added.info(&info.name).is_none()).collect();
        tensors.extend(self.added.tensors());
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        tensors
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let own = || self.source.info(&self.check_shown(name).ok()?);
        self.added.info(name).or_else(own).map(|info| TensorInfo { name: name.to_owned(), ..info })
    }

    fn read(&self, name: &str) -> Result<RawTensor> {
        match self.added.info(name) {
            Some(_) => self.added.read(name),
            None => self.source.read(&self.check_shown(name)?),
        }
    }

    fn read_range(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        match self.added.info(name) {
            Some(_) => self.added.read_range(name, range),
            None => self.source.read_range(&self.check_shown(name)?, range),
        }
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        match self.added.info(name) {
            Some(_) => self.added.tensor(name),
            None => self.source.tensor(&self.check_shown(name)?),
        }
    }
}

//! [`GgufPlan`]: how each tensor of a model is stored in a GGUF file, and its bytes.

use crate::{ConvertError, Result};
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use clearform_ops::quantize;
use clearform_weights::{
    Digest, Dtype, GgufEntry, GgufSink, RawTensor, TensorInfo, TensorSource, WeightsError, block_format_for,
    block_format_name, is_finite, write_gguf,
};
use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::path::Path;

/// Values of a matrix that are converted at a time: 16 MiB of f32.
const VALUES_AT_ONCE: usize = 1 << 22;

/// A tensor of up to 256 MiB is read at once, since what edits or replaces it may have to be computed as a whole.
const WHOLE: u64 = 1 << 28;

/// How the tensors of a model are stored in a GGUF file: the matrices of its blocks in one format, with another where rows are
/// no multiple of that one's blocks; what has no blocks as it is, but vectors in f32. So stable-diffusion.cpp and
/// ComfyUI-GGUF do it.
pub struct GgufPlan<'a> {
    source: &'a dyn TensorSource,
    entries: Vec<GgufEntry>,
    /// Number of matrices by the format that they have in place of the one asked for; `None` for those that stay as they are.
    fallbacks: BTreeMap<Option<&'static str>, usize>,
}

impl<'a> GgufPlan<'a> {
    /// The tensors of `source`, with the matrices of its blocks in `format`; `None` keeps those as they are that are in
    /// blocks already.
    pub fn new(source: &'a dyn TensorSource, format: Option<GgmlDType>) -> Result<Self> {
        let mut plan = Self { source, entries: Vec::new(), fallbacks: BTreeMap::new() };
        for info in source.tensors() {
            let blocks = match format {
                Some(format) if is_block_matrix(&info) => plan.blocks_for(&info, format),
                Some(_) => None,
                None => stored_blocks(source, &info)?,
            };
            let dtype = plain_dtype(&info);
            plan.entries.push(GgufEntry { info: TensorInfo { dtype, ..info }, blocks });
        }
        Ok(plan)
    }

    /// What is said of the formats of the matrices, where `wanted` was asked for.
    pub fn summary(&self, wanted: GgmlDType) -> String {
        let quantized = self.entries.iter().filter(|entry| entry.blocks.is_some()).count();
        let named = |(format, count): (&Option<&str>, &usize)| match format {
            Some(format) => format!("{count} in {format}"),
            None => format!("{count} as they are"),
        };
        let others = self.fallbacks.iter().map(named).collect::<Vec<_>>().join(", ");
        let name = block_format_name(wanted);
        let others = if others.is_empty() { others } else { format!("; rows that {name} does not divide: {others}") };
        let all = self.entries.len();
        format!("{quantized} of {all} tensors are quantised, the matrices of the model's blocks{others}")
    }

    /// Bytes of all tensors in the file.
    ///
    /// # Errors
    /// GGUF has no type for a tensor.
    pub fn byte_count(&self) -> Result<u64> {
        self.entries.iter().map(|entry| Ok(entry.byte_count()?)).sum()
    }

    /// Writes the file of a model of `family`, with `texts` as further metadata. `progress` gets the bytes of each tensor that
    /// is written, and may cancel.
    ///
    /// # Errors
    /// [`ConvertError::Cancelled`]; a tensor cannot be read, is not finite and would be quantised, or the file cannot be
    /// written.
    pub fn write(
        &self,
        path: &Path,
        family: &str,
        mut texts: BTreeMap<String, String>,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Digest> {
        // So ComfyUI-GGUF calls its families.
        texts.insert("general.architecture".to_owned(), family.to_owned());
        write_gguf(path, &self.entries, &texts, |entry, sink| {
            self.send(entry, sink)?;
            match progress(entry.byte_count()?) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(ConvertError::Cancelled),
            }
        })
    }

    /// The format for a matrix, where `format` is wanted.
    fn blocks_for(&mut self, info: &TensorInfo, format: GgmlDType) -> Option<GgmlDType> {
        let found = block_format_for(format, info.shape[1]);
        if found != Some(format) {
            *self.fallbacks.entry(found.map(block_format_name)).or_default() += 1;
        }
        found
    }

    fn send(&self, entry: &GgufEntry, sink: &mut GgufSink) -> Result<()> {
        let GgufEntry { info, blocks } = entry;
        let Some(blocks) = blocks else {
            sink.send(self.plain(info)?);
            return Ok(());
        };
        let [rows, columns] = [info.shape[0], info.shape[1]];
        let is_stored = stored_blocks(self.source, info)? == Some(*blocks);
        let stored = self.source.info(&info.name).ok_or_else(|| WeightsError::Missing { name: info.name.clone() })?;
        let whole = (!is_stored && stored.byte_count() <= WHOLE).then(|| self.source.read(&info.name)).transpose()?;
        let step = (VALUES_AT_ONCE / columns.max(1)).max(1);
        for first in (0..rows).step_by(step) {
            let some = first..(first + step).min(rows);
            let kept = if is_stored { self.source.quantized_rows(&info.name, some.clone())? } else { None };
            match kept {
                Some(rows) => sink.send(rows.into_bytes()),
                None => sink.send(quantize(*blocks, &self.rows(&stored, whole.as_ref(), some)?)),
            }
        }
        Ok(())
    }

    /// The bytes of a tensor in the dtype of `info`.
    fn plain(&self, info: &TensorInfo) -> Result<Vec<u8>> {
        let stored = self.source.read(&info.name)?;
        if stored.dtype == info.dtype {
            return Ok(stored.bytes);
        }
        let values = stored.to_tensor(&info.name)?.to_dtype(DType::try_from(info.dtype)?)?;
        Ok(clearform_weights::InMemoryTensors::from_iter([(info.name.clone(), values)]).read(&info.name)?.bytes)
    }

    /// Some rows of a matrix in f32, from all of its bytes if they have been read.
    fn rows(&self, stored: &TensorInfo, whole: Option<&RawTensor>, rows: Range<usize>) -> Result<Vec<f32>> {
        let TensorInfo { name, dtype, shape } = stored;
        let row = shape[1] * dtype.bitsize() / 8;
        let range = rows.start * row..rows.end * row;
        let shape = [rows.len(), shape[1]];
        let tensor = |bytes: &[u8]| Tensor::from_raw_buffer(bytes, DType::try_from(*dtype)?, &shape, &Device::Cpu);
        let values = match whole {
            Some(whole) => tensor(&whole.bytes[range])?,
            None => tensor(&self.source.read_range(name, range)?)?,
        };
        let values = values.to_dtype(DType::F32)?;
        if !is_finite(&values)? {
            let reason = "contains NaN or infinity, which no quantised format has; copy the file again from where the model \
                          came from";
            return Err(WeightsError::BadTensor { name: name.clone(), reason: reason.to_owned() }.into());
        }
        Ok(values.flatten_all()?.to_vec1()?)
    }
}

/// Whether `info` is a matrix of one of a model's numbered blocks. Embedders and the last layer are small and matter much.
fn is_block_matrix(info: &TensorInfo) -> bool {
    let parts: Vec<&str> = info.name.split('.').collect();
    let is_numbered = |pair: &[&str]| {
        let is_list = pair[0].ends_with("blocks") || pair[0].ends_with("layers");
        is_list && !pair[1].is_empty() && pair[1].bytes().all(|byte| byte.is_ascii_digit())
    };
    info.shape.len() == 2 && parts.windows(2).any(is_numbered)
}

/// The format of blocks that a matrix is stored in.
fn stored_blocks(source: &dyn TensorSource, info: &TensorInfo) -> Result<Option<GgmlDType>> {
    let row = match info.shape[..] {
        [rows, _] if rows > 0 => source.quantized_rows(&info.name, 0..1)?,
        _ => None,
    };
    Ok(row.and_then(|row| match row.format() {
        clearform_weights::QuantizedFormat::Blocks(format) => Some(format),
        clearform_weights::QuantizedFormat::Fp8(_) => None,
    }))
}

/// The dtype of a tensor that is not in blocks. Vectors are read as f32 by other programs, and GGUF has no fp8.
fn plain_dtype(info: &TensorInfo) -> Dtype {
    match info.dtype {
        Dtype::BF16 | Dtype::F16 | Dtype::F64 if info.shape.len() <= 1 => Dtype::F32,
        Dtype::F8_E4M3 | Dtype::F8_E5M2 => Dtype::BF16,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_of_blocks_are_quantised() {
        let info = |name: &str, shape: &[usize]| TensorInfo {
            name: name.to_owned(),
            dtype: Dtype::BF16,
            shape: shape.to_vec(),
        };
        for name in
            ["double_blocks.3.img_attn.qkv.weight", "transformer_blocks.0.attn.to_q.weight", "layers.11.wq.weight"]
        {
            assert!(is_block_matrix(&info(name, &[64, 64])), "{name}");
            assert!(!is_block_matrix(&info(name, &[64])), "{name}");
        }
        for name in ["img_in.weight", "final_layer.adaLN_modulation.1.weight", "t_embedder.mlp.0.weight"] {
            assert!(!is_block_matrix(&info(name, &[64, 64])), "{name}");
        }
    }
}

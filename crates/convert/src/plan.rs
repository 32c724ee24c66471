//! [`ConversionPlan`]: what a conversion writes, and [writing](ConversionPlan::apply) it, one tensor at a time.

use crate::model_card::ModelCard;
use crate::{AttentionOverlay, ConvertError, GgufPlan, Result};
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Tensor};
use clearform_attention::{AttentionPlan, learning_layer};
use clearform_layout::{Identified, LoadReport};
use clearform_portable_model::{ComponentData, CopyMode, ModelRecord, PLAN_METADATA, SourceRecord, StagingDir};
use clearform_weights::{InMemoryTensors, RawTensor, TensorInfo, TensorSource, WeightsError};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::PathBuf;

/// Path of the transformer's tensors in a portable model.
pub const TRANSFORMER_FILE: &str = "transformer/diffusion_pytorch_model.safetensors";

/// The same of a quantised transformer.
const QUANTIZED_FILE: &str = "transformer/diffusion_pytorch_model.gguf";

/// What a conversion writes.
pub struct ConversionPlan {
    identified: Identified,
    attention: AttentionPlan,
    dtype: Option<DType>,
    component_folders: Vec<PathBuf>,
    copy_mode: CopyMode,
    component_data: Vec<ComponentData>,
    source: Option<PathBuf>,
    quantize: Option<GgmlDType>,
}

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct ConversionReport {
    /// What became of each input tensor of the transformer.
    pub load_report: LoadReport,
    /// Tensors that the attention plan adds, with their initial values.
    pub added: Vec<String>,
    /// The other components of the pipeline that the model contains.
    pub components: Vec<String>,
    /// Those that its pipeline needs and it lacks.
    pub missing_components: Vec<String>,
    /// What became of each tensor of the components that were not copied as files, by component.
    pub component_reports: BTreeMap<String, LoadReport>,
    /// Tensors of the transformer with NaN or infinity, with which it cannot be computed.
    pub not_finite: Vec<String>,
    /// Which matrices were quantised, and how; `None` if none was asked for.
    pub quantized: Option<String>,
    /// Elements of all tensors of the transformer.
    pub parameters: u64,
}

impl ConversionPlan {
    /// Gives the identified transformer the attention of `attention`. Nothing else is changed or added.
    pub fn new(identified: &Identified, attention: AttentionPlan) -> Self {
        Self {
            identified: identified.clone(),
            attention,
            dtype: None,
            component_folders: Vec::new(),
            copy_mode: CopyMode::Copy,
            component_data: Vec::new(),
            source: None,
            quantize: None,
        }
    }

    /// Writes the transformer as GGUF, with the matrices of its blocks in this format; `None` writes safetensors.
    #[must_use]
    pub fn quantized(mut self, format: Option<GgmlDType>) -> Self {
        self.quantize = format;
        self
    }

    /// Names the model that the transformer was read from in README.md.
    #[must_use]
    pub fn made_from(mut self, source: PathBuf) -> Self {
        self.source = Some(source);
        self
    }

    /// Writes floating-point tensors in this dtype; `None` keeps the source's.
    #[must_use]
    pub fn with_dtype(mut self, dtype: Option<DType>) -> Self {
        self.dtype = dtype;
        self
    }

    /// Copies the other components of the pipeline from `folders`, each from the first folder that contains it.
    #[must_use]
    pub fn with_components(mut self, folders: Vec<PathBuf>, copy_mode: CopyMode) -> Self {
        self.component_folders = folders;
        self.copy_mode = copy_mode;
        self
    }

    /// Writes these components from their tensors. They take precedence over the folders of [`Self::with_components`].
    #[must_use]
    pub fn with_component_data(mut self, components: Vec<ComponentData>) -> Self {
        self.component_data = components;
        self
    }

    /// The record of a model that is written by this plan, without its files.
    ///
    /// # Errors
    /// The attention plan cannot be written as TOML.
    pub fn record(&self, source: Vec<SourceRecord>) -> Result<ModelRecord> {
        let mut record = ModelRecord::new(&self.identified.family, &self.identified.variant.name, &self.attention)?;
        record.source = source;
        Ok(record)
    }

    /// Writes the transformer `canonical` (canonical names) and the other components into `stage`. `progress` gets the
    /// bytes of the transformer that are written and all of its bytes, and may cancel.
    ///
    /// # Errors
    /// [`ConvertError::Cancelled`]; the disk is too full, a tensor cannot be read or converted, or a file cannot be written.
    pub fn apply(
        &self,
        canonical: &dyn TensorSource,
        load_report: &LoadReport,
        stage: &mut StagingDir,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<ConversionReport> {
        let added = self.added(canonical)?;
        let tensors = self.outputs(canonical, &added)?;
        let (not_finite, quantized) = match self.quantize {
            Some(format) => (Vec::new(), Some(self.write_quantized(canonical, &added, format, stage, progress)?)),
            None => (self.write_transformer(canonical, &added, &tensors, stage, progress)?, None),
        };
        let config = serde_json::to_vec_pretty(&self.identified.config).unwrap_or_default();
        stage.write("transformer/config.json", &config)?;
        let components = self.write_components(stage)?;
        Ok(ConversionReport {
            load_report: load_report.clone(),
            added: added.iter().map(|(name, _)| name.to_owned()).collect(),
            missing_components: self.missing(&components),
            components,
            component_reports: self
                .component_data
                .iter()
                .map(|component| (component.name.clone(), component.load_report.clone()))
                .collect(),
            not_finite,
            quantized,
            parameters: tensors.iter().map(|info| info.shape.iter().product::<usize>() as u64).sum(),
        })
    }

    /// Writes README.md, the model's card, by what `record` says of the model.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_card(&self, record: &ModelRecord, stage: &StagingDir) -> Result<()> {
        let source = self.source.as_deref();
        let card = ModelCard { identified: &self.identified, attention: &self.attention, source, record };
        Ok(stage.write("README.md", card.text().as_bytes())?)
    }

    /// Learned tensors of the attention plan that the source lacks.
    fn added(&self, source: &dyn TensorSource) -> Result<InMemoryTensors> {
        let optional = self.identified.expected().into_iter().filter(|tensor| tensor.optional);
        let layers: BTreeSet<String> =
            optional.filter_map(|tensor| Some(learning_layer(&tensor.name)?.to_owned())).collect();
        let learned = layers.iter().filter_map(|layer| self.attention.learned(layer).transpose());
        let learned = learned.collect::<candle_core::Result<Vec<_>>>()?;
        Ok(learned.into_iter().filter(|(name, _)| source.info(name).is_none()).collect())
    }

    fn outputs(&self, source: &dyn TensorSource, added: &InMemoryTensors) -> Result<Vec<TensorInfo>> {
        let converted = source.tensors().into_iter().map(|info| TensorInfo { dtype: self.output_dtype(&info), ..info });
        Ok(converted.chain(added.tensors()).collect())
    }

    fn output_dtype(&self, info: &TensorInfo) -> clearform_weights::Dtype {
        use clearform_weights::Dtype::{BF16, F16, F32, F64};
        match self.dtype {
            Some(dtype) if matches!(info.dtype, BF16 | F16 | F32 | F64) => dtype.into(),
            _ => info.dtype,
        }
    }

    /// Writes the transformer, and returns the names of tensors with NaN or infinity.
    fn write_transformer(
        &self,
        source: &dyn TensorSource,
        added: &InMemoryTensors,
        tensors: &[TensorInfo],
        stage: &mut StagingDir,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<Vec<String>> {
        stage.check_disk_space(tensors.iter().map(TensorInfo::byte_count).sum::<u64>() + self.component_bytes())?;
        let mut not_finite = Vec::new();
        let all = tensors.iter().map(TensorInfo::byte_count).sum();
        let mut done = 0;
        stage.write_tensors(TRANSFORMER_FILE, tensors, self.metadata(), |info| {
            let name = &info.name;
            let tensor = if added.info(name).is_some() { added.read(name)? } else { source.read(name)? };
            if !tensor.is_finite() {
                not_finite.push(name.clone());
            }
            done += info.byte_count();
            if progress(done, all).is_break() {
                return Err(ConvertError::Cancelled);
            }
            Ok(in_dtype_of(info, tensor)?)
        })?;
        Ok(not_finite)
    }

    /// Writes the transformer with the matrices of its blocks in `format`, and returns what is said of them.
    fn write_quantized(
        &self,
        source: &dyn TensorSource,
        added: &InMemoryTensors,
        format: GgmlDType,
        stage: &mut StagingDir,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<String> {
        let all = AttentionOverlay::new(source, added);
        let plan = GgufPlan::new(&all, Some(format))?;
        let size = plan.byte_count()?;
        stage.check_disk_space(size + self.component_bytes())?;
        let mut done = 0;
        let mut watch = |bytes: u64| {
            done += bytes;
            progress(done, size)
        };
        let family = &self.identified.family;
        stage.write_with(QUANTIZED_FILE, |file| plan.write(file, family, self.metadata(), &mut watch))?;
        Ok(plan.summary(format))
    }

    /// Metadata of the transformer's file: alone, without the record, it still says what it is meant to run with.
    fn metadata(&self) -> BTreeMap<String, String> {
        let plan = (PLAN_METADATA.to_owned(), self.attention.to_toml());
        Some(plan).filter(|_| self.attention != AttentionPlan::full()).into_iter().collect()
    }

    /// Writes or copies every component that is found, and returns their names.
    fn write_components(&self, stage: &mut StagingDir) -> Result<Vec<String>> {
        let mut written = Vec::new();
        for name in self.identified.all_components() {
            if let Some(component) = self.data_of(name) {
                component.write(stage)?;
                written.push(name.clone());
            } else if let Some(folder) = self.find(name) {
                stage.copy_files(&folder, name, self.copy_mode)?;
                written.push(name.clone());
            }
        }
        if let Some(index) = self.find("model_index.json") {
            let bytes = std::fs::read(&index).map_err(|source| ConvertError::Io { path: index.clone(), source })?;
            if self.fits_index(&bytes) {
                stage.write("model_index.json", &bytes)?;
            }
        }
        Ok(written)
    }

    /// The components that the pipeline needs and that are none of `written`.
    fn missing(&self, written: &[String]) -> Vec<String> {
        self.identified.components().iter().filter(|name| !written.contains(name)).cloned().collect()
    }

    /// Whether a model_index.json names the class of this transformer. Components may be taken from another pipeline, whose
    /// index must not be copied.
    fn fits_index(&self, index: &[u8]) -> bool {
        let index: serde_json::Value = serde_json::from_slice(index).unwrap_or_default();
        let class = &index["transformer"][1];
        class.is_null() || *class == self.identified.config["_class_name"]
    }

    fn data_of(&self, name: &str) -> Option<&ComponentData> {
        self.component_data.iter().find(|component| component.name == name)
    }

    /// The first folder or file called `name` in the component folders.
    fn find(&self, name: &str) -> Option<PathBuf> {
        self.component_folders.iter().map(|folder| folder.join(name)).find(|path| path.exists())
    }

    fn component_bytes(&self) -> u64 {
        let copied = self.identified.all_components().filter(|name| self.data_of(name).is_none());
        let folders = copied.filter_map(|name| self.find(name));
        let entries = folders.flat_map(|folder| walkdir::WalkDir::new(folder).follow_links(true));
        let copied: u64 = entries
            .filter_map(|entry| entry.ok()?.metadata().ok())
            .filter(|metadata| metadata.is_file())
            .map(|metadata| metadata.len())
            .sum();
        copied + self.component_data.iter().map(ComponentData::byte_count).sum::<u64>()
    }
}

/// Refuses a conversion to f16 that makes a finite value infinite: f16 ends at 65504.
fn check_range(name: &str, stored: &Tensor, converted: &Tensor) -> clearform_weights::Result<()> {
    if converted.dtype() != DType::F16 || converted.elem_count() == 0 {
        return Ok(());
    }
    let largest = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    let before = largest(stored)?;
    if before.is_finite() && largest(converted)?.is_infinite() {
        let reason = format!("its largest value, {before:e}, does not fit f16, which ends at 65504: write bf16 or f32");
        return Err(WeightsError::BadTensor { name: name.to_owned(), reason });
    }
    Ok(())
}

/// `tensor` converted to the dtype of `info`, where it is another.
fn in_dtype_of(info: &TensorInfo, tensor: RawTensor) -> clearform_weights::Result<RawTensor> {
    if tensor.dtype == info.dtype {
        return Ok(tensor);
    }
    let stored = tensor.to_tensor(&info.name)?;
    let converted = stored.to_dtype(DType::try_from(info.dtype)?)?;
    check_range(&info.name, &stored, &converted)?;
    InMemoryTensors::from_iter([(info.name.clone(), converted)]).read(&info.name)
}

//! [`ConversionPlan`]: what is to be written, and [applying](ConversionPlan::apply) it, one tensor at a time.

use crate::{ConvertError, Result};
use candle_core::DType;
use clearform_attention::AttentionPlan;
use clearform_layout::{Identified, LoadReport};
use clearform_portable_model::{ComponentData, CopyMode, ModelRecord, SourceRecord, StagingDir};
use clearform_weights::{InMemoryTensors, RawTensor, TensorInfo, TensorSource};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Where the transformer's tensors lie in a portable model.
pub const TRANSFORMER: &str = "transformer/diffusion_pytorch_model.safetensors";

/// What is to be written.
pub struct ConversionPlan {
    identified: Identified,
    attention: AttentionPlan,
    dtype: Option<DType>,
    components: Vec<PathBuf>,
    placing: CopyMode,
    parts: Vec<ComponentData>,
}

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct ConversionReport {
    /// The fate of each input tensor.
    pub load_report: LoadReport,
    /// Tensors that the attention plan adds, with their initial values.
    pub added: Vec<String>,
    /// Parts of the pipeline that were taken along.
    pub components: Vec<String>,
    /// The fate of each tensor of those that were written anew, by part.
    pub component_reports: BTreeMap<String, LoadReport>,
    /// Numbers in the transformer.
    pub parameters: u64,
}

impl ConversionPlan {
    /// A plan that gives the identified transformer the attention that is asked for.
    pub fn new(identified: &Identified, attention: AttentionPlan) -> Self {
        let identified = identified.clone();
        let (components, parts) = (Vec::new(), Vec::new());
        Self { identified, attention, dtype: None, components, placing: CopyMode::Copy, parts }
    }

    /// Writes floating-point tensors in this number format, not in the source's.
    #[must_use]
    pub fn with_dtype(mut self, dtype: Option<DType>) -> Self {
        self.dtype = dtype;
        self
    }

    /// Takes the parts of a pipeline along from these folders, each part from the first that has it.
    #[must_use]
    pub fn with_components(mut self, folders: Vec<PathBuf>, placing: CopyMode) -> Self {
        self.components = folders;
        self.placing = placing;
        self
    }

    /// Writes these parts of the pipeline anew, whatever folders hold them.
    #[must_use]
    pub fn with_parts(mut self, parts: Vec<ComponentData>) -> Self {
        self.parts = parts;
        self
    }

    /// What a model by this plan is recorded as.
    ///
    /// # Errors
    /// A plan that cannot be written.
    pub fn record(&self, source: Vec<SourceRecord>) -> Result<ModelRecord> {
        let mut record = ModelRecord::new(&self.identified.family, &self.identified.variant.name, &self.attention)?;
        record.source = source;
        Ok(record)
    }

    /// Writes the transformer, given under canonical names, and its parts into `stage`. `watch` is told the bytes
    /// written and the bytes in all.
    ///
    /// # Errors
    /// Too little room, a tensor that cannot be read or converted, or what the system says.
    pub fn apply(
        &self,
        canonical: &dyn TensorSource,
        load_report: &LoadReport,
        stage: &mut StagingDir,
        watch: &mut dyn FnMut(u64, u64),
    ) -> Result<ConversionReport> {
        let added = self.added(canonical)?;
        let tensors = self.outputs(canonical, &added)?;
        stage.check_room(tensors.iter().map(TensorInfo::byte_count).sum::<u64>() + self.component_bytes())?;
        self.write_transformer(canonical, &added, &tensors, stage, watch)?;
        let components = self.place_components(stage)?;
        stage.write("README.md", self.readme().as_bytes())?;
        Ok(ConversionReport {
            load_report: load_report.clone(),
            added: added.iter().map(|(name, _)| name.to_owned()).collect(),
            components,
            component_reports: self.parts.iter().map(|part| (part.name.clone(), part.load_report.clone())).collect(),
            parameters: tensors.iter().map(|info| info.shape.iter().product::<usize>() as u64).sum(),
        })
    }

    /// Learned tensors of the attention plan that the source lacks.
    fn added(&self, source: &dyn TensorSource) -> Result<InMemoryTensors> {
        let places = self.identified.expected().into_iter().filter(|tensor| tensor.optional);
        let layers: BTreeSet<String> = places.filter_map(|tensor| layer_of(&tensor.name)).collect();
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

    fn write_transformer(
        &self,
        source: &dyn TensorSource,
        added: &InMemoryTensors,
        tensors: &[TensorInfo],
        stage: &mut StagingDir,
        watch: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let (mut done, all) = (0, tensors.iter().map(TensorInfo::byte_count).sum());
        stage.write_tensors(TRANSFORMER, tensors, |info| {
            let name = &info.name;
            let tensor = if added.info(name).is_some() { added.read(name)? } else { source.read(name)? };
            done += info.byte_count();
            watch(done, all);
            converted(tensor, info)
        })?;
        let config = serde_json::to_vec_pretty(&self.identified.config).unwrap_or_default();
        Ok(stage.write("transformer/config.json", &config)?)
    }

    fn place_components(&self, stage: &mut StagingDir) -> Result<Vec<String>> {
        let mut placed = Vec::new();
        for name in self.part_names() {
            if let Some(part) = self.part(name) {
                part.write(stage)?;
                placed.push(name.clone());
            } else if let Some(folder) = self.component(name) {
                stage.copy_files(&folder, name, self.placing)?;
                placed.push(name.clone());
            }
        }
        if let Some(index) = self.component("model_index.json") {
            let bytes = std::fs::read(&index).map_err(|source| ConvertError::Io { path: index.clone(), source })?;
            if self.is_index_of(&bytes) {
                stage.write("model_index.json", &bytes)?;
            }
        }
        Ok(placed)
    }

    /// Whether a model_index.json is of a pipeline with this transformer: components may come from another's.
    fn is_index_of(&self, index: &[u8]) -> bool {
        let index: serde_json::Value = serde_json::from_slice(index).unwrap_or_default();
        let class = &index["transformer"][1];
        class.is_null() || *class == self.identified.config["_class_name"]
    }

    /// Names of all parts that the pipeline has or may have beside its transformer.
    fn part_names(&self) -> impl Iterator<Item = &String> {
        self.identified.components().iter().chain(self.identified.optional_components())
    }

    fn part(&self, name: &str) -> Option<&ComponentData> {
        self.parts.iter().find(|part| part.name == name)
    }

    fn component(&self, name: &str) -> Option<PathBuf> {
        self.components.iter().map(|folder| folder.join(name)).find(|path| path.exists())
    }

    fn component_bytes(&self) -> u64 {
        let copied = self.part_names().filter(|name| self.part(name).is_none());
        let files = copied.filter_map(|name| self.component(name));
        let entries = files.flat_map(|folder| walkdir::WalkDir::new(folder).follow_links(true));
        let copied: u64 = entries
            .filter_map(|entry| entry.ok()?.metadata().ok())
            .filter(|data| data.is_file())
            .map(|data| data.len())
            .sum();
        copied + self.parts.iter().map(ComponentData::byte_count).sum::<u64>()
    }

    fn readme(&self) -> String {
        format!(
            "# A linear {family} model\n\n\
             This folder holds a {family} diffusion transformer (variant {variant}) whose attention was rewritten by \
             clearform: `{plan}`. clearform.toml says where it came from, how it was distilled, and the size and hash of \
             every file.\n\n\
             Run it with `clearform generate FOLDER \"PROMPT\"`, or with `--class N` where it draws classes. Where \
             diffusers has the class that transformer/config.json names, it can open the folder too, but runs the \
             transformer with full attention, which is neither linear nor what it was distilled for, unless CLEAR's \
             attention processors are set.\n",
            family = self.identified.family,
            variant = self.identified.variant.name,
            plan = self.attention,
        )
    }
}

/// The attention layer that a learned tensor belongs to.
fn layer_of(name: &str) -> Option<String> {
    name.strip_suffix(".processor.spatial_weight").map(str::to_owned)
}

fn converted(tensor: RawTensor, info: &TensorInfo) -> clearform_weights::Result<RawTensor> {
    if tensor.dtype == info.dtype {
        return Ok(tensor);
    }
    let dtype = DType::try_from(info.dtype)?;
    let one: InMemoryTensors =
        [(info.name.clone(), tensor.to_tensor(&info.name)?.to_dtype(dtype)?)].into_iter().collect();
    one.read(&info.name)
}

//! [`AttentionPatch`]: the distilled attention of a model as one file, and applying it to another model.
//!
//! A patch contains tensors under canonical names. The files that CLEAR's authors publish are patches too. They have no
//! metadata, so radius and pooling come from their names.

use crate::{ConvertError, Result};
use candle_core::{DType, Tensor};
use clearform_attention::{AttentionPlan, Policy, Radius, learning_layer};
use clearform_portable_model::PLAN_METADATA;
use clearform_weights::{
    Checkpoint, InMemoryTensors, QuantizedMatrix, RawTensor, TensorInfo, TensorSource, WeightsError, content_hash, save,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;

/// How a patch is applied to a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PatchMode {
    /// The patch's tensors replace the model's, as in CLEAR.
    #[default]
    Replace,
    /// The model's tensors move by what distillation changed, W + (W_student - W_teacher), which keeps what a fine-tuned
    /// model has learned.
    Shift,
}

/// An open patch.
#[derive(Debug)]
pub struct AttentionPatch {
    tensors: Checkpoint,
    plan: AttentionPlan,
    base: Option<String>,
}

// Keys and values of the metadata of the safetensors file, beside PLAN_METADATA.
const KIND: &str = "clearform.kind";
const PATCH: &str = "attention-patch";
const FAMILY: &str = "clearform.family";
const BASE: &str = "clearform.base_sha256";
const TENSORS: &str = "clearform.tensors";

impl AttentionPatch {
    /// Writes the attention tensors of `model` that differ from `base`, both under canonical names, to `path`. Returns how
    /// many there are.
    ///
    /// # Errors
    /// [`ConvertError::DoesNotFit`] if nothing differs or the models have different architectures.
    pub fn extract(
        model: &dyn TensorSource,
        base: &dyn TensorSource,
        family: &str,
        plan: &AttentionPlan,
        path: &Path,
    ) -> Result<usize> {
        let mut changed = InMemoryTensors::default();
        for name in attention_names(model) {
            let tensor = model.tensor(&name)?;
            if is_changed(&name, &tensor, base)? {
                changed.insert(name, tensor);
            }
        }
        let names: Vec<String> = changed.tensors().into_iter().map(|info| info.name).collect();
        if names.is_empty() {
            return Err(ConvertError::DoesNotFit(
                "the model's attention is identical to that of its base; there is nothing to extract".into(),
            ));
        }
        save(path, &changed, &metadata(family, plan, fingerprint(base, &names)?, names.len()))?;
        Ok(names.len())
    }

    /// Opens a patch. `radius` is required if neither the metadata nor the file's name contains it.
    ///
    /// # Errors
    /// The file is not a patch or lacks tensors, or the radius is unknown or another than the recorded one.
    pub fn open(path: &Path, radius: Option<Radius>) -> Result<Self> {
        let tensors = Checkpoint::open(path)?;
        let bad = |reason: String| ConvertError::BadPatch { path: path.to_owned(), reason };
        if let Some(foreign) = tensors.tensors().iter().find(|info| !is_attention(&info.name)) {
            return Err(bad(format!(
                "expected only attention tensors, found tensor {:?}; this is not a patch",
                foreign.name
            )));
        }
        let found = tensors.tensors().len();
        if let Some(recorded) = tensors.metadata().get(TENSORS).filter(|recorded| **recorded != found.to_string()) {
            return Err(bad(format!(
                "expected the {recorded} tensors that it was extracted with, found {found}; extract or download it again"
            )));
        }
        let recorded = match tensors.metadata().get(PLAN_METADATA) {
            Some(text) => Some(AttentionPlan::from_toml(text)?),
            None => plan_of_name(path),
        };
        let plan = match (recorded, radius) {
            (Some(plan), Some(radius)) if radius_of(&plan) != Some(radius) => {
                return Err(bad(format!(
                    "was distilled for {plan}, not for radius {}; leave --radius out. Other windows can be tried with \
                     `generate --attention`",
                    radius.tokens()
                )));
            }
            (Some(plan), _) => plan,
            (None, Some(radius)) => AttentionPlan::clear(radius, pool_of(&tensors)),
            (None, None) => {
                return Err(bad("has no metadata, and its name contains no radius; pass --radius R".to_owned()));
            }
        };
        let base = tensors.metadata().get(BASE).cloned();
        Ok(Self { tensors, plan, base })
    }

    /// Its tensors.
    pub fn source(&self) -> &dyn TensorSource {
        &self.tensors
    }

    /// The attention plan that the patch was distilled for.
    pub fn plan(&self) -> &AttentionPlan {
        &self.plan
    }

    /// The family of the model that the patch was extracted from; `None` for the files of CLEAR's authors.
    pub fn family(&self) -> Option<&str> {
        self.tensors.metadata().get(FAMILY).map(String::as_str)
    }

    /// `target` with the patch applied. [`PatchMode::Shift`] requires `base`, the teacher of the patch.
    ///
    /// # Errors
    /// [`ConvertError::DoesNotFit`] if the target lacks a tensor of the patch or has it in another shape, if the base is
    /// missing, if it is not the teacher that the patch was distilled from, or if the target is shifted already.
    pub fn apply_to<'a>(
        &'a self,
        target: &'a dyn TensorSource,
        mode: PatchMode,
        base: Option<&'a dyn TensorSource>,
    ) -> Result<AttentionOverlay<'a>> {
        for info in self.tensors.tensors().iter().filter(|info| !is_learned(&info.name)) {
            check_shape(info, target, "the model")?;
        }
        let base = match (mode, base) {
            (PatchMode::Replace, _) => None,
            (PatchMode::Shift, Some(base)) => {
                self.check_unpatched(target)?;
                Some(self.check_base(base)?)
            }
            (PatchMode::Shift, None) => {
                return Err(ConvertError::DoesNotFit("shift needs the teacher; pass --base TEACHER".into()));
            }
        };
        Ok(AttentionOverlay { target, patch: &self.tensors, base })
    }

    /// Refuses to shift the model that the patch was extracted from.
    fn check_unpatched(&self, target: &dyn TensorSource) -> Result<()> {
        let mut names = self.tensors.tensors().into_iter().map(|info| info.name).filter(|name| !is_learned(name));
        let differs = |name: String| is_changed(&name, &target.tensor(&name)?, &self.tensors);
        match names.next().map(differs).transpose()? {
            Some(false) => Err(ConvertError::DoesNotFit(
                "the model has the patch's attention already, and shifting it would add the change twice; apply the patch \
                 to the model as it was before"
                    .into(),
            )),
            _ => Ok(()),
        }
    }

    fn check_base<'a>(&self, base: &'a dyn TensorSource) -> Result<&'a dyn TensorSource> {
        let infos = self.tensors.tensors();
        infos.iter().filter(|info| !is_learned(&info.name)).try_for_each(|info| check_shape(info, base, "the base"))?;
        let names: Vec<String> = infos.into_iter().map(|info| info.name).collect();
        match &self.base {
            Some(recorded) if *recorded != fingerprint(base, &names)? => {
                Err(ConvertError::DoesNotFit("the base is not the teacher that this patch was distilled from".into()))
            }
            _ => Ok(base),
        }
    }
}

/// A transformer with an attention patch over it, or with the attention that was just distilled. Each tensor is computed
/// when it is read.
pub struct AttentionOverlay<'a> {
    target: &'a dyn TensorSource,
    patch: &'a dyn TensorSource,
    base: Option<&'a dyn TensorSource>,
}

impl<'a> AttentionOverlay<'a> {
    /// `target` with its tensors replaced by those of `changed`, in the dtypes of `target`. Tensors of `changed` that
    /// `target` does not have are added.
    pub fn new(target: &'a dyn TensorSource, changed: &'a dyn TensorSource) -> Self {
        Self { target, patch: changed, base: None }
    }
}

impl TensorSource for AttentionOverlay<'_> {
    fn tensors(&self) -> Vec<TensorInfo> {
        let mut infos: BTreeMap<String, TensorInfo> =
            self.patch.tensors().into_iter().map(|info| (info.name.clone(), info)).collect();
        infos.extend(self.target.tensors().into_iter().map(|info| (info.name.clone(), info)));
        infos.into_values().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.target.info(name).or_else(|| self.patch.info(name))
    }

    fn read(&self, name: &str) -> clearform_weights::Result<RawTensor> {
        if self.patch.info(name).is_none() {
            return self.target.read(name);
        }
        InMemoryTensors::from_iter([(name.to_owned(), self.patched(name)?)]).read(name)
    }

    fn read_range(&self, name: &str, range: Range<usize>) -> clearform_weights::Result<Vec<u8>> {
        match self.patch.info(name) {
            None => self.target.read_range(name, range),
            Some(_) => InMemoryTensors::from_iter([(name.to_owned(), self.patched(name)?)]).read_range(name, range),
        }
    }

    fn quantized_rows(&self, name: &str, rows: Range<usize>) -> clearform_weights::Result<Option<QuantizedMatrix>> {
        match self.patch.info(name) {
            None => self.target.quantized_rows(name, rows),
            Some(_) => Ok(None),
        }
    }
}

impl AttentionOverlay<'_> {
    fn patched(&self, name: &str) -> clearform_weights::Result<Tensor> {
        let student = self.patch.tensor(name)?;
        let info = self.info(name).ok_or_else(|| WeightsError::Missing { name: name.to_owned() })?;
        let dtype = DType::try_from(info.dtype).unwrap_or(student.dtype());
        let teacher = self.base.filter(|_| !is_learned(name)).map(|base| base.tensor(name)).transpose()?;
        match teacher {
            None => Ok(student.to_dtype(dtype)?),
            Some(teacher) => {
                let change = (student.to_dtype(DType::F32)? - teacher.to_dtype(DType::F32)?)?;
                Ok((self.target.tensor(name)?.to_dtype(DType::F32)? + change)?.to_dtype(dtype)?)
            }
        }
    }
}

/// Whether `name` is one of the projections that CLEAR distils, in any family, or a pooling weight.
fn is_attention(name: &str) -> bool {
    let Some((layer, parameter)) = PROJECTIONS.iter().find_map(|projection| name.split_once(projection)) else {
        return is_learned(name);
    };
    LAYERS.iter().any(|suffix| layer.ends_with(suffix)) && !parameter.is_empty()
}

// Canonical names are those of diffusers, but for families that diffusers does not have (`.attention`, `.wq`).
const LAYERS: [&str; 4] = [".attn", ".attn1", ".attn2", ".attention"];
const PROJECTIONS: [&str; 8] = [".to_q.", ".to_k.", ".to_v.", ".to_out.", ".wq.", ".wk.", ".wv.", ".wo."];

/// Whether `name` is a pooling weight, which the teacher does not have.
fn is_learned(name: &str) -> bool {
    learning_layer(name).is_some()
}

/// A tensor in which a model differs from the one that it should have been distilled from.
#[derive(Debug, Clone, PartialEq)]
pub struct BaseDifference {
    /// Its name.
    pub tensor: String,
    /// The norm of the difference as a share of that of the base; infinite if the base has no such tensor.
    pub share: f64,
}

impl BaseDifference {
    /// Above this share, another number format cannot be the reason.
    const FORMAT: f64 = 0.1;

    /// The tensor beside attention that differs the most between `model` and `base`. There is none if `model` was
    /// distilled from `base`, since distillation changes attention alone.
    ///
    /// # Errors
    /// A tensor cannot be read.
    pub fn largest(model: &dyn TensorSource, base: &dyn TensorSource) -> Result<Option<Self>> {
        let mut largest: Option<Self> = None;
        for TensorInfo { name, shape, .. } in model.tensors().into_iter().filter(|info| !is_attention(&info.name)) {
            let share = match base.info(&name).is_some_and(|found| found.shape == shape) {
                true => relative_difference(&model.tensor(&name)?, &base.tensor(&name)?)?,
                false => f64::INFINITY,
            };
            if share > largest.as_ref().map_or(0.0, |largest| largest.share) {
                largest = Some(Self { tensor: name, share });
            }
        }
        Ok(largest)
    }

    /// Whether the two are surely different models.
    pub fn is_of_another_model(&self) -> bool {
        self.share > Self::FORMAT
    }
}

impl fmt::Display for BaseDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.share.is_finite() {
            true => write!(f, "tensor {:?} differs by {:.2}%", self.tensor, 100.0 * self.share),
            false => write!(f, "it has no tensor {:?} of that shape", self.tensor),
        }
    }
}

/// The norm of the difference as a share of that of `base`, which is rounded to the dtype of `tensor` first.
fn relative_difference(tensor: &Tensor, base: &Tensor) -> Result<f64> {
    let norm = |tensor: &Tensor| -> Result<f64> { Ok(f64::from(tensor.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt()) };
    let base = base.to_dtype(tensor.dtype())?.to_dtype(DType::F32)?;
    let difference = norm(&(tensor.to_dtype(DType::F32)? - &base)?)?;
    Ok(if difference == 0.0 { 0.0 } else { difference / norm(&base)? })
}

fn attention_names(source: &dyn TensorSource) -> BTreeSet<String> {
    source.tensors().into_iter().map(|info| info.name).filter(|name| is_attention(name)).collect()
}

/// The base is rounded to the dtype of `tensor` first, so that a model stored in another dtype than its base differs only
/// where training changed it.
fn is_changed(name: &str, tensor: &Tensor, base: &dyn TensorSource) -> Result<bool> {
    if is_learned(name) {
        return Ok(true);
    }
    let info = TensorInfo { name: name.to_owned(), dtype: tensor.dtype().into(), shape: tensor.dims().to_vec() };
    check_shape(&info, base, "the base")?;
    let base = base.tensor(name)?.to_dtype(tensor.dtype())?.to_dtype(DType::F32)?;
    let difference = (tensor.to_dtype(DType::F32)? - base)?.abs()?.flatten_all()?;
    Ok(difference.max(0)?.to_scalar::<f32>()? != 0.0)
}

fn check_shape(info: &TensorInfo, other: &dyn TensorSource, what: &str) -> Result<()> {
    let found = other.info(&info.name);
    match &found {
        Some(found) if found.shape == info.shape => Ok(()),
        Some(found) => Err(ConvertError::DoesNotFit(format!(
            "tensor {:?} is {:?} in the patch and {:?} in {what}; they have different architectures",
            info.name, info.shape, found.shape
        ))),
        None => Err(ConvertError::DoesNotFit(format!("tensor {:?} is missing in {what}", info.name))),
    }
}

/// Hash of the tensors of the base that a patch replaces, with their canonical names and stored bytes, so that the same
/// base is recognised in any layout.
fn fingerprint(base: &dyn TensorSource, names: &[String]) -> Result<String> {
    let names = names.iter().filter(|name| !is_learned(name)).map(String::as_str);
    Ok(content_hash(base, names)?)
}

fn metadata(family: &str, plan: &AttentionPlan, base: String, tensors: usize) -> BTreeMap<String, String> {
    let mut metadata = BTreeMap::from([
        (KIND.to_owned(), PATCH.to_owned()),
        (FAMILY.to_owned(), family.to_owned()),
        (PLAN_METADATA.to_owned(), plan.to_toml()),
        (BASE.to_owned(), base),
        (TENSORS.to_owned(), tensors.to_string()),
    ]);
    if let Policy::Clear { radius, pool } = plan.default_policy() {
        metadata.insert("clearform.radius".to_owned(), radius.tokens().to_string());
        metadata.extend(pool.map(|pool| ("clearform.pool".to_owned(), pool.to_string())));
    }
    metadata
}

/// The radius of all layers of `plan`.
fn radius_of(plan: &AttentionPlan) -> Option<Radius> {
    match plan.default_policy() {
        Policy::Clear { radius, .. } => Some(radius),
        Policy::Full => None,
    }
}

/// The pooling factor d, from the shape (1, 1, 1, d, 1, d, 1) of a pooling weight.
fn pool_of(tensors: &Checkpoint) -> Option<usize> {
    let learned = tensors.tensors().into_iter().find(|info| is_learned(&info.name))?;
    learned.shape.get(3).copied()
}

/// The plan in a name such as `clear_local_16_down_4.safetensors`, as CLEAR's authors name their files.
fn plan_of_name(path: &Path) -> Option<AttentionPlan> {
    let stem = path.file_stem()?.to_str()?;
    let rest = stem.split_once("clear_local_")?.1;
    let (radius, pool) = match rest.split_once("_down_") {
        Some((radius, pool)) => (radius, Some(pool.parse().ok()?)),
        None => (rest, None),
    };
    Some(AttentionPlan::clear(Radius::new(radius.parse().ok()?).ok()?, pool))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    const QUERY: &str = "transformer_blocks.0.attn.to_q.weight";
    const OTHER: &str = "x_embedder.weight";

    fn model(query: f32, dtype: DType) -> InMemoryTensors {
        let tensor = |value: f32| Tensor::full(value, (2, 2), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        [(QUERY.to_owned(), tensor(query)), (OTHER.to_owned(), tensor(9.0))].into_iter().collect()
    }

    fn value(source: &dyn TensorSource, name: &str) -> f32 {
        source.tensor(name).unwrap().to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap()[0][0]
    }

    fn extracted(folder: &Path) -> std::path::PathBuf {
        let path = folder.join("patch.safetensors");
        let plan = "clear:r=3".parse().unwrap();
        let count =
            AttentionPatch::extract(&model(5.0, DType::F32), &model(2.0, DType::F32), "flux", &plan, &path).unwrap();
        assert_eq!(count, 1);
        path
    }

    #[test]
    fn replace_takes_the_student_and_shift_adds_its_change() {
        let folder = tempfile::tempdir().unwrap();
        let patch = AttentionPatch::open(&extracted(folder.path()), None).unwrap();
        assert_eq!(patch.plan().to_string(), "clear:r=3");
        let fine_tune = model(2.5, DType::BF16);
        let teacher = model(2.0, DType::F32);
        let replaced = patch.apply_to(&fine_tune, PatchMode::Replace, None).unwrap();
        assert_eq!(value(&replaced, QUERY), 5.0);
        let shifted = patch.apply_to(&fine_tune, PatchMode::Shift, Some(&teacher)).unwrap();
        assert_eq!((value(&shifted, QUERY), value(&shifted, OTHER)), (5.5, 9.0));
        assert_eq!(shifted.tensor(QUERY).unwrap().dtype(), DType::BF16);
    }

    #[test]
    fn shift_needs_the_same_teacher() {
        let folder = tempfile::tempdir().unwrap();
        let patch = AttentionPatch::open(&extracted(folder.path()), None).unwrap();
        let target = model(2.5, DType::F32);
        let other = model(2.1, DType::F32);
        let error = |base| patch.apply_to(&target, PatchMode::Shift, base).err().unwrap().to_string();
        assert!(error(None).contains("pass --base TEACHER"));
        assert!(error(Some(&other)).contains("not the teacher"));
    }

    #[test]
    fn a_student_is_not_shifted_again() {
        let folder = tempfile::tempdir().unwrap();
        let patch = AttentionPatch::open(&extracted(folder.path()), None).unwrap();
        let [student, teacher] = [5.0, 2.0].map(|query| model(query, DType::F32));
        let error = patch.apply_to(&student, PatchMode::Shift, Some(&teacher)).err().unwrap().to_string();
        assert!(error.contains("would add the change twice"), "{error}");
        assert!(patch.apply_to(&student, PatchMode::Replace, None).is_ok());
    }

    #[test]
    fn a_radius_beside_the_recorded_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = extracted(folder.path());
        let error = AttentionPatch::open(&path, Some(Radius::new(9.0).unwrap())).unwrap_err().to_string();
        assert!(error.contains("was distilled for clear:r=3, not for radius 9"), "{error}");
        assert!(AttentionPatch::open(&path, Some(Radius::new(3.0).unwrap())).is_ok());
    }

    #[test]
    fn a_model_shares_what_is_not_attention_with_its_base() {
        let base = model(2.0, DType::F32);
        let largest = |model: &InMemoryTensors, base: &InMemoryTensors| BaseDifference::largest(model, base).unwrap();
        assert_eq!(largest(&model(5.0, DType::BF16), &base), None);
        let other: InMemoryTensors =
            [(OTHER.to_owned(), Tensor::full(8f32, (2, 2), &Device::Cpu).unwrap())].into_iter().collect();
        let found = largest(&other, &base).unwrap();
        assert!(found.tensor == OTHER && (found.share - 1.0 / 9.0).abs() < 1e-6 && found.is_of_another_model());
        assert_eq!(found.to_string(), "tensor \"x_embedder.weight\" differs by 11.11%");
        assert_eq!(largest(&base, &InMemoryTensors::default()).unwrap().share, f64::INFINITY);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let patch = AttentionPatch::open(&extracted(folder.path()), None).unwrap();
        let empty = InMemoryTensors::default();
        assert!(patch.apply_to(&empty, PatchMode::Replace, None).err().unwrap().to_string().contains(QUERY));
        let same = model(2.0, DType::F32);
        let path = folder.path().join("none.safetensors");
        let error = AttentionPatch::extract(&same, &same, "flux", &AttentionPlan::full(), &path).unwrap_err();
        assert!(error.to_string().contains("nothing to extract"));
    }

    #[test]
    fn names_of_published_files_contain_the_plan() {
        for (name, plan) in
            [("clear_local_16.safetensors", "clear:r=16"), ("clear_local_8_down_4.safetensors", "clear:r=8,d=4")]
        {
            assert_eq!(plan_of_name(Path::new(name)).unwrap().to_string(), plan);
        }
        assert!(plan_of_name(Path::new("lora.safetensors")).is_none());
    }
}

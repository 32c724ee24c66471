//! [`TeacherStudent`]: teacher and student over the same frozen weights. Only the trained parameters exist twice.

use crate::fingerprint::Fingerprint;
use crate::{DistillError, Result};
use candle_core::{DType, Device, Tensor, Var};
use clearform_attention::AttentionPlan;
use clearform_models::{Architecture, Denoiser, DistilledLayer, NoiseProcess, SeparateSamples};
use clearform_weights::{InMemoryTensors, ProductPrecision, SourceWithProducts, TensorSource};
use std::collections::BTreeMap;

/// Trained parameters of a model whose samples run separately, at most: 16 MiB of gradients for each sample.
const SMALL: usize = 1 << 22;

/// What teacher and student are built from besides weights.
#[derive(Clone, Copy)]
pub struct PairSpec<'a> {
    /// The architecture of both.
    pub architecture: &'a dyn Architecture,
    /// The student's attention; the teacher's is full.
    pub plan: &'a AttentionPlan,
    /// How f32 activations are multiplied in training. What is evaluated is computed in full precision.
    pub products: ProductPrecision,
}

/// A teacher and its student.
pub struct TeacherStudent {
    teacher: Box<dyn Denoiser>,
    student: Box<dyn Denoiser>,
    /// The teacher with the products of training.
    training_teacher: Box<dyn Denoiser>,
    /// The student with the same masters and the products of training. It records its operations for gradients.
    trained: Box<dyn Denoiser>,
    process: NoiseProcess,
    masters: BTreeMap<String, Var>,
    fingerprint: String,
}

impl TeacherStudent {
    /// Builds both from the teacher's weights. The student's trained parameters are initialised from `start`: the teacher,
    /// or an earlier student. They are f32 whatever the dtype of the frozen weights. Pooling weights that `start` does not
    /// have get the initial values of the plan.
    ///
    /// # Errors
    /// A tensor is missing or has another shape, or a layer has nothing to train.
    pub fn build(spec: PairSpec, teacher: &InMemoryTensors, start: &dyn TensorSource) -> Result<Self> {
        let full = AttentionPlan::full();
        let built = spec.architecture.build(teacher, &full)?;
        let with_products = |source, products| SourceWithProducts { source, products };
        let training_teacher = spec.architecture.build(&with_products(teacher.clone(), spec.products), &full)?;
        let mut masters = BTreeMap::new();
        for layer in built.layer_names() {
            masters.extend(layer_masters(layer, spec, teacher, start)?);
        }
        let fingerprint = fingerprint(spec, teacher, &masters)?;
        let student = |products, value: fn(&Var) -> Tensor| {
            let mut weights = teacher.clone();
            masters.iter().for_each(|(name, master)| weights.insert(name.clone(), value(master)));
            spec.architecture.build(&with_products(weights, products), spec.plan)
        };
        let trained = student(spec.products, |master| master.as_tensor().clone())?;
        let student = student(ProductPrecision::Full, Var::as_detached_tensor)?;
        let parameters = teacher.iter().map(|(_, tensor)| tensor.elem_count()).sum();
        let device = masters.values().next().map_or(Device::Cpu, |master| master.device().clone());
        let [teacher, student, training_teacher, trained] = [built, student, training_teacher, trained]
            .map(|denoiser| SeparateSamples::if_small(denoiser, parameters, &device));
        Ok(Self {
            fingerprint,
            teacher,
            student,
            training_teacher,
            trained,
            process: spec.architecture.pipeline_spec().noise_process(),
            masters,
        })
    }

    /// The model that is learned from.
    pub fn teacher(&self) -> &dyn Denoiser {
        self.teacher.as_ref()
    }

    /// The same with the products of training.
    pub fn training_teacher(&self) -> &dyn Denoiser {
        self.training_teacher.as_ref()
    }

    /// The model that learns, with the products of training; it records its operations.
    pub fn student_with_gradients(&self) -> &dyn Denoiser {
        self.trained.as_ref()
    }

    /// The model that learns, to be evaluated. It computes with the current values of the masters.
    pub fn student(&self) -> &dyn Denoiser {
        self.student.as_ref()
    }

    /// How samples are noised for both.
    pub fn process(&self) -> NoiseProcess {
        self.process
    }

    /// The device that both run on.
    pub fn device(&self) -> Device {
        self.masters.values().next().map_or(Device::Cpu, |master| master.device().clone())
    }

    /// Whether samples run separately, each on one thread. Each then has gradients of its own, so only where these are
    /// small, and only on a CPU.
    pub(crate) fn is_small(&self) -> bool {
        let trained: usize = self.masters.values().map(|master| master.elem_count()).sum();
        trained <= SMALL && self.device().is_cpu()
    }

    /// The trained parameters by name: f32 master copies, as in mixed-precision training.
    pub fn masters(&self) -> &BTreeMap<String, Var> {
        &self.masters
    }

    /// Tells this pair, as it was built, from any with other weights, another start or other attention.
    pub(crate) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// A copy of the trained parameters as they are now.
    ///
    /// # Errors
    /// candle fails to copy a tensor.
    pub fn snapshot(&self) -> Result<BTreeMap<String, Tensor>> {
        self.masters.iter().map(|(name, master)| Ok((name.clone(), master.as_tensor().copy()?.detach()))).collect()
    }

    /// Sets the trained parameters.
    ///
    /// # Errors
    /// A name is missing, or a tensor has another shape.
    pub fn restore(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        for (name, master) in &self.masters {
            let tensor = tensors.get(name).ok_or_else(|| {
                DistillError::Mismatch(format!(
                    "trained tensor {name:?} is missing: the training state belongs to another model"
                ))
            })?;
            master.set(&tensor.to_dtype(DType::F32)?.to_device(master.device())?.copy()?)?;
        }
        Ok(())
    }
}

fn fingerprint(spec: PairSpec, teacher: &InMemoryTensors, masters: &BTreeMap<String, Var>) -> Result<String> {
    let mut fingerprint = Fingerprint::default();
    fingerprint.text(&serde_json::to_string(spec.plan).unwrap_or_else(|_| spec.plan.to_string()));
    teacher.iter().try_for_each(|(name, tensor)| fingerprint.tensor(name, tensor))?;
    masters.iter().try_for_each(|(name, master)| fingerprint.tensor(name, master))?;
    Ok(fingerprint.finish())
}

/// The masters of a block's attention layers. Families may list a second attention layer that a block does not have.
fn layer_masters(
    layer: &str,
    spec: PairSpec,
    teacher: &InMemoryTensors,
    start: &dyn TensorSource,
) -> Result<Vec<(String, Var)>> {
    let mut masters = Vec::new();
    for distilled in spec.architecture.distilled_layers(layer) {
        let projections = projection_masters(&distilled, teacher, start)?;
        let device = projections.first().map(|(_, master)| master.device().clone());
        masters.extend(projections);
        if let Some(device) = device {
            masters.extend(pooling_master(&distilled.name, spec.plan, start, &device)?);
        }
    }
    match masters.is_empty() {
        true => Err(DistillError::Mismatch(format!("layer {layer:?} has no parameter to train"))),
        false => Ok(masters),
    }
}

fn projection_masters(
    layer: &DistilledLayer,
    teacher: &InMemoryTensors,
    start: &dyn TensorSource,
) -> Result<Vec<(String, Var)>> {
    let present = layer.parameters.iter().filter(|parameter| teacher.info(parameter).is_some());
    let masters = present.map(|parameter| {
        let frozen = teacher.tensor(parameter)?;
        Ok((parameter.clone(), master(&start.tensor(parameter)?, &frozen)?))
    });
    masters.collect()
}

/// The pooling weight that the plan adds to `layer`, if it adds one.
///
/// Training may continue from an earlier student. Its projections were trained together with its pooling weights, so these
/// are taken from it too; beside trained projections the plan's initial value (plain averaging) would undo part of what
/// was learned. A teacher has no pooling weights, and there the initial value is right.
fn pooling_master(
    layer: &str,
    plan: &AttentionPlan,
    start: &dyn TensorSource,
    device: &Device,
) -> Result<Option<(String, Var)>> {
    let Some((name, initial)) = plan.learned(layer)? else { return Ok(None) };
    let value = if start.info(&name).is_some() { start.tensor(&name)? } else { initial };
    let value = value.to_device(device)?;
    let master = master(&value, &value)?;
    Ok(Some((name, master)))
}

/// An f32 variable with the values of `start`, on the device and in the shape of `frozen`.
fn master(start: &Tensor, frozen: &Tensor) -> Result<Var> {
    if start.dims() != frozen.dims() {
        let reason = format!(
            "expected a tensor of shape {:?} as the student's initial value, found {:?}",
            frozen.dims(),
            start.dims()
        );
        return Err(DistillError::Mismatch(reason));
    }
    let start = start.detach().to_device(frozen.device())?.to_dtype(DType::F32)?;
    Ok(Var::from_tensor(&start)?)
}

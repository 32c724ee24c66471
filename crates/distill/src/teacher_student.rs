//! [`TeacherStudent`]: teacher and student over the same frozen weights. Only what is trained exists twice.

use crate::{DistillError, Result};
use candle_core::{DType, Device, Tensor, Var};
use clearform_attention::AttentionPlan;
use clearform_models::{Denoiser, DistilledLayer, Family, NoiseProcess};
use clearform_weights::{InMemoryTensors, TensorSource};
use serde_json::Value;
use std::collections::BTreeMap;

/// What teacher and student are built from besides weights.
#[derive(Clone, Copy)]
pub struct PairSpec<'a> {
    /// The architecture of both.
    pub family: &'a dyn Family,
    /// The config.json of both.
    pub config: &'a Value,
    /// The student's attention; the teacher's is full.
    pub plan: &'a AttentionPlan,
}

/// A teacher and its student.
pub struct TeacherStudent {
    teacher: Box<dyn Denoiser>,
    student: Box<dyn Denoiser>,
    process: NoiseProcess,
    masters: BTreeMap<String, Var>,
}

impl TeacherStudent {
    /// Builds both from the teacher's weights. The student's trained parameters start as `start` has them, which is the
    /// teacher itself or an earlier student, and are f32 whatever the frozen weights are; learned tensors of the plan
    /// that `start` lacks take their initial values.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, or a layer with nothing to train.
    pub fn build(spec: PairSpec, teacher: &InMemoryTensors, start: &dyn TensorSource) -> Result<Self> {
        let built = spec.family.build(spec.config, teacher, &AttentionPlan::full())?;
        let mut masters = BTreeMap::new();
        for layer in built.layers() {
            masters.extend(masters_of(layer, spec, teacher, start)?);
        }
        let mut weights = teacher.clone();
        for (name, master) in &masters {
            weights.insert(name.clone(), master.as_tensor().clone());
        }
        let student = spec.family.build(spec.config, &weights, spec.plan)?;
        Ok(Self { teacher: built, student, process: spec.family.noise_process(), masters })
    }

    /// The model that is learned from.
    pub fn teacher(&self) -> &dyn Denoiser {
        self.teacher.as_ref()
    }

    /// The model that learns. It computes with the masters as they are at that moment.
    pub fn student(&self) -> &dyn Denoiser {
        self.student.as_ref()
    }

    /// How samples are noised for both.
    pub fn process(&self) -> NoiseProcess {
        self.process
    }

    /// Where both compute.
    pub fn device(&self) -> Device {
        self.masters.values().next().map_or(Device::Cpu, |master| master.device().clone())
    }

    /// The trained parameters by name, f32.
    pub fn masters(&self) -> &BTreeMap<String, Var> {
        &self.masters
    }

    /// A copy of the trained parameters as they are now.
    ///
    /// # Errors
    /// The tensor library refused.
    pub fn snapshot(&self) -> Result<BTreeMap<String, Tensor>> {
        self.masters.iter().map(|(name, master)| Ok((name.clone(), master.as_tensor().copy()?.detach()))).collect()
    }

    /// Sets the trained parameters.
    ///
    /// # Errors
    /// A name that is missing, or another shape.
    pub fn restore(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        for (name, master) in &self.masters {
            let tensor = tensors.get(name).ok_or_else(|| {
                DistillError::Mismatch(format!("trained tensor {name:?} is missing: these are of another model"))
            })?;
            master.set(&tensor.to_dtype(DType::F32)?.to_device(master.device())?.copy()?)?;
        }
        Ok(())
    }
}

/// The parameters of a block's attention layers; a block need not have the second one of its family.
fn masters_of(
    layer: &str,
    spec: PairSpec,
    teacher: &InMemoryTensors,
    start: &dyn TensorSource,
) -> Result<Vec<(String, Var)>> {
    let mut masters = Vec::new();
    for DistilledLayer { name, parameters } in spec.family.distilled(layer) {
        let present = parameters.iter().filter(|parameter| teacher.info(parameter).is_some());
        let own = present.map(|parameter| {
            let frozen = teacher.tensor(parameter)?;
            Ok((parameter.clone(), master(&start.tensor(parameter)?, &frozen)?))
        });
        let own = own.collect::<Result<Vec<_>>>()?;
        let device = own.first().map(|(_, master)| master.device().clone());
        masters.extend(own);
        if let (Some(device), Some((name, initial))) = (device, spec.plan.learned(&name)?) {
            let found = if start.info(&name).is_some() { start.tensor(&name)? } else { initial };
            masters.push((name, master(&found.to_device(&device)?, &found.to_device(&device)?)?));
        }
    }
    match masters.is_empty() {
        true => Err(DistillError::Mismatch(format!("layer {layer:?} has no parameter to train"))),
        false => Ok(masters),
    }
}

fn master(start: &Tensor, frozen: &Tensor) -> Result<Var> {
    if start.dims() != frozen.dims() {
        let reason = format!("a student's {:?} cannot start from {:?}", frozen.dims(), start.dims());
        return Err(DistillError::Mismatch(reason));
    }
    let start = start.detach().to_device(frozen.device())?.to_dtype(DType::F32)?;
    Ok(Var::from_tensor(&start)?)
}

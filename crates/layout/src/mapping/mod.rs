//! [`Mapping`]: what a set of rules makes of a list of tensors, by names and shapes alone.

use crate::manifest::config_values::ConfigValues;
use crate::manifest::family::{FamilyManifest, Layout};
use crate::manifest::pattern::{Captures, Pattern};
use crate::manifest::rule::{MappingKind, MappingStep, Reorder, Reshape};
use crate::mapping::assembly::TensorAssembly;
use crate::mapping::load_report::TensorOutcome;
use clearform_weights::TensorInfo;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

pub(crate) mod assembly;
pub(crate) mod dequantized;
pub(crate) mod load_report;
pub(crate) mod parameter_map;
pub(crate) mod prefix_view;
mod suggestions;

/// Why most tensors that are not understood are not.
pub(crate) const UNKNOWN: &str = "no rule knows this name";

/// Outputs by name and what became of each input.
#[derive(Debug, Default)]
pub(crate) struct Mapping {
    pub tensors: BTreeMap<String, TensorAssembly>,
    /// What rules drop, by its foreign name: it may still show a setting.
    pub dropped: BTreeMap<String, TensorAssembly>,
    pub outcomes: BTreeMap<String, TensorOutcome>,
}

/// What is known of the model when its tensors are mapped.
#[derive(Clone, Copy)]
pub(crate) struct MappingContext<'a> {
    pub family: &'a FamilyManifest,
    /// None before the sizes are known.
    pub sizes: Option<&'a ConfigValues>,
}

/// The tensors that one application of a step takes together.
struct StepInputs<'a> {
    /// By place in the step.
    slots: Vec<Option<&'a TensorInfo>>,
    /// All of them; copies may share a place.
    inputs: Vec<&'a TensorInfo>,
}

impl Mapping {
    /// Applies `steps` to `inputs`: (name as the rules know it, tensor under its own name).
    pub fn new(steps: &[MappingStep], inputs: &[(String, TensorInfo)], context: MappingContext) -> Self {
        let mut mapping = Self::default();
        let mut groups: BTreeMap<(usize, Captures), StepInputs> = BTreeMap::new();
        for (name, info) in inputs {
            match find(steps, name, context) {
                Some((at, slot, captures)) => {
                    let step = &steps[at];
                    if matches!(step.how, MappingKind::Drop(_)) {
                        mapping.dropped.insert(name.clone(), TensorAssembly::whole(info, name));
                    }
                    let group = groups.entry((at, step.group_key(captures))).or_insert_with(|| StepInputs::of(step));
                    group.slots[slot].get_or_insert(info);
                    group.inputs.push(info);
                }
                None => mapping.record(info, TensorOutcome::Unmatched { reason: UNKNOWN.to_owned() }),
            }
        }
        for ((step, captures), group) in groups {
            mapping.apply_step(&steps[step], captures, &group, context);
        }
        mapping
    }

    fn apply_step(&mut self, step: &MappingStep, captures: Captures, group: &StepInputs, context: MappingContext) {
        let outcome = match step.apply(captures, group, context) {
            Ok(outputs) => self.add_outputs(outputs, &step.how),
            Err(reason) => TensorOutcome::Unmatched { reason },
        };
        for info in &group.inputs {
            self.record(info, outcome.clone());
        }
    }

    fn add_outputs(&mut self, outputs: Vec<TensorAssembly>, how: &MappingKind) -> TensorOutcome {
        if let MappingKind::Drop(reason) = how {
            return TensorOutcome::Skipped { reason: reason.clone() };
        }
        let names: Vec<String> = outputs.iter().map(|output| output.info.name.clone()).collect();
        if let Some(name) = names.iter().find(|name| self.tensors.contains_key(*name)) {
            return TensorOutcome::Unmatched { reason: format!("another tensor gives {name:?} already") };
        }
        for output in outputs {
            self.tensors.insert(output.info.name.clone(), output);
        }
        TensorOutcome::Used { names }
    }

    fn record(&mut self, info: &TensorInfo, outcome: TensorOutcome) {
        if let Entry::Vacant(free) = self.outcomes.entry(info.name.clone()) {
            free.insert(outcome);
        }
    }
}

impl StepInputs<'_> {
    fn of(step: &MappingStep) -> Self {
        Self { slots: vec![None; step.inputs.len()], inputs: Vec::new() }
    }
}

impl MappingStep {
    /// Where `name` stands among the inputs, if the step is for its block; before sizes are known it is for every one.
    fn slot(&self, name: &str, context: MappingContext) -> Option<(usize, Captures)> {
        let captured = |(slot, input): (usize, &Pattern)| Some((slot, input.captures(name)?));
        let (slot, captures) = self.inputs.iter().enumerate().find_map(captured)?;
        let (Some(sizes), Some(number), false) = (context.sizes, captures.number, self.blocks.are_all()) else {
            return Some((slot, captures));
        };
        self.blocks.hold(number, self.count(context.family, sizes), sizes).then_some((slot, captures))
    }

    /// What the outputs have in their places where the inputs have `captures`, once sizes are known.
    fn output_captures(&self, captures: Captures, context: MappingContext) -> Captures {
        match (context.sizes, captures.number) {
            (Some(sizes), Some(number)) if self.mirrored => {
                let mirrored = self.count(context.family, sizes).checked_sub(number + 1);
                Captures { number: mirrored.or(captures.number), ..captures }
            }
            _ => captures,
        }
    }

    /// How many blocks it runs over. One side has canonical names; the family counts no blocks by the other's.
    fn count(&self, family: &FamilyManifest, sizes: &ConfigValues) -> usize {
        let names = self.outputs.iter().chain(&self.inputs).map(Pattern::as_str);
        names.map(|name| family.blocks_of(name, sizes)).max().unwrap_or(0)
    }

    fn apply(
        &self,
        captures: Captures,
        group: &StepInputs,
        context: MappingContext,
    ) -> Result<Vec<TensorAssembly>, String> {
        let names = self.names(captures, context);
        match (&self.how, &self.inputs(captures, group)?[..], &names[..]) {
            (MappingKind::Same(edit, reshape), [input], [name]) => {
                let output = match edit {
                    None => TensorAssembly::whole(input, name),
                    Some(Reorder::SwapHalves) => TensorAssembly::swapped(input, name)?,
                };
                reshape.apply(output, context).map(|output| vec![output])
            }
            (MappingKind::Split(shares), [input], names) => TensorAssembly::split(input, names, shares),
            (MappingKind::Join(shares), inputs, [name]) => {
                TensorAssembly::join(inputs, name, shares).map(|output| vec![output])
            }
            (MappingKind::Copy, [input], names) => {
                Ok(names.iter().map(|name| TensorAssembly::whole(input, name)).collect())
            }
            (MappingKind::Pick, inputs, [name]) => TensorAssembly::picked(inputs, name).map(|output| vec![output]),
            (MappingKind::Drop(_), ..) => Ok(Vec::new()),
            _ => Err("its rule does not say what to do with it".to_owned()),
        }
    }

    /// What inputs of one application have in common: copies from all blocks go back to one tensor.
    fn group_key(&self, captures: Captures) -> Captures {
        match self.how {
            MappingKind::Pick if !self.outputs.iter().any(Pattern::is_numbered) => {
                Captures { number: None, ..captures }
            }
            _ => captures,
        }
    }

    fn inputs<'a>(&self, captures: Captures, group: &StepInputs<'a>) -> Result<Vec<&'a TensorInfo>, String> {
        if matches!(self.how, MappingKind::Pick | MappingKind::Drop(_)) {
            return Ok(group.inputs.clone());
        }
        let partner = |pattern: &Pattern| format!("it belongs to {:?}, which is missing", pattern.fill(captures));
        group.slots.iter().zip(&self.inputs).map(|(slot, pattern)| slot.ok_or_else(|| partner(pattern))).collect()
    }

    /// Names of the outputs; a number that no input has runs over all blocks.
    fn names(&self, captures: Captures, context: MappingContext) -> Vec<String> {
        let blocks =
            |output: &Pattern| context.sizes.map_or(1, |sizes| context.family.blocks_of(output.as_str(), sizes));
        let captures = self.output_captures(captures, context);
        let mut names = Vec::new();
        for output in &self.outputs {
            match output.is_numbered() && captures.number.is_none() {
                true => {
                    names.extend((0..blocks(output)).map(|at| output.fill(Captures { number: Some(at), ..captures })))
                }
                false => names.push(output.fill(captures)),
            }
        }
        names
    }
}

impl Layout {
    /// The name that the canonical tensor `name` is found under, where it is another.
    pub fn foreign_name(&self, name: &str, prefix: &str, context: MappingContext) -> Option<String> {
        let fill = |step: &MappingStep| {
            let (_, captures) = step.slot(name, context)?;
            Some(format!("{prefix}{}", step.outputs.first()?.fill(step.output_captures(captures, context))))
        };
        self.outward.iter().find_map(fill).filter(|foreign| foreign != name)
    }
}

impl Reshape {
    fn apply(&self, mut output: TensorAssembly, context: MappingContext) -> Result<TensorAssembly, String> {
        let Some(sizes) = context.sizes else { return Ok(output) };
        let shape: Option<Vec<usize>> = match self {
            Self::Keep => return Ok(output),
            Self::Canonical => context.family.expected_shape(&output.info.name, sizes),
            Self::To(extents) => extents.iter().map(|extent| extent.value(sizes)).collect(),
        };
        let found = &output.info.shape;
        match shape {
            Some(shape) if count(&shape).is_some_and(|elements| count(found) == Some(elements)) => {
                output.info.shape = shape;
            }
            _ => return Err(format!("its shape {found:?} cannot become {shape:?}")),
        }
        Ok(output)
    }
}

fn find(steps: &[MappingStep], name: &str, context: MappingContext) -> Option<(usize, usize, Captures)> {
    let fitting =
        |(at, step): (usize, &MappingStep)| step.slot(name, context).map(|(slot, captures)| (at, slot, captures));
    steps.iter().enumerate().find_map(fitting)
}

fn count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, extent| product.checked_mul(*extent))
}

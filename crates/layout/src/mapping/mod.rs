//! [`Mapping`]: the result of applying a layout's rules to a list of tensors, by names and shapes only.
//!
//! This folder applies the rules of `manifest` to tensors: [`assembly`] is an output and its pieces, [`dequantized`]
//! comes before it for fp8 files, [`load_report`] states the result, [`parameter_map`] looks names up in all layouts,
//! and [`prefix_view`] selects a component's tensors. `detect` decides which rules to apply.

pub(crate) mod assembly;
pub(crate) mod dequantized;
pub(crate) mod load_report;
pub(crate) mod parameter_map;
pub(crate) mod prefix_view;
mod suggestions;

use crate::manifest::config_values::ConfigValues;
use crate::manifest::family::{FamilyManifest, Layout};
use crate::manifest::pattern::{Captures, Pattern};
use crate::manifest::rule::{MappingKind, MappingStep, Reorder, Reshape};
use crate::mapping::assembly::TensorAssembly;
use crate::mapping::load_report::TensorOutcome;
use clearform_weights::TensorInfo;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// The usual reason why a tensor is unmatched.
pub(crate) const UNKNOWN: &str = "no rule matches this name";

/// Outputs by name, and the outcome of each input.
#[derive(Debug, Default)]
pub(crate) struct Mapping {
    pub tensors: BTreeMap<String, TensorAssembly>,
    /// Dropped inputs by their foreign names: their shapes may still show a setting.
    pub dropped: BTreeMap<String, TensorAssembly>,
    pub outcomes: BTreeMap<String, TensorOutcome>,
}

/// What is known of the model when its tensors are mapped.
#[derive(Clone, Copy)]
pub(crate) struct MappingContext<'a> {
    pub family: &'a FamilyManifest,
    /// `None` before the sizes are known.
    pub sizes: Option<&'a ConfigValues>,
}

/// The inputs of one application of a step.
struct StepInputs<'a> {
    /// One for each input pattern of the step.
    slots: Vec<Option<&'a TensorInfo>>,
    /// All of them: of a [`MappingKind::Pick`], several match the same pattern.
    inputs: Vec<&'a TensorInfo>,
}

impl Mapping {
    /// Applies `steps` to `inputs`: (name without the prefix, tensor under its name in the source).
    pub fn new(steps: &[MappingStep], inputs: &[(String, TensorInfo)], context: MappingContext) -> Self {
        let mut mapping = Self::default();
        let mut groups: BTreeMap<(usize, Captures), StepInputs> = BTreeMap::new();
        for (name, info) in inputs {
            match find(steps, name, context) {
                Some((index, slot, captures)) => {
                    let step = &steps[index];
                    if matches!(step.kind, MappingKind::Drop(_)) {
                        mapping.dropped.insert(name.clone(), TensorAssembly::whole(info, name));
                    }
                    let group = groups.entry((index, step.group_key(captures))).or_insert_with(|| StepInputs::of(step));
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

    /// Gives tensors the leading extents of 1 that the family's shapes have: GGUF drops them.
    pub fn restore_ranks(&mut self, family: &FamilyManifest) {
        for (name, tensor) in &mut self.tensors {
            tensor.extend_to(family.rank_of(name).unwrap_or(0));
        }
    }

    /// Whether the input `name` became a tensor of the model.
    pub fn is_used(&self, name: &str) -> bool {
        matches!(self.outcomes.get(name), Some(TensorOutcome::Used { .. }))
    }

    fn apply_step(&mut self, step: &MappingStep, captures: Captures, group: &StepInputs, context: MappingContext) {
        let outcome = match step.apply(captures, group, context) {
            Ok(outputs) => self.add_outputs(outputs, &step.kind),
            Err(reason) => TensorOutcome::Unmatched { reason },
        };
        for info in &group.inputs {
            self.record(info, outcome.clone());
        }
    }

    fn add_outputs(&mut self, outputs: Vec<TensorAssembly>, kind: &MappingKind) -> TensorOutcome {
        if let MappingKind::Drop(reason) = kind {
            return TensorOutcome::Skipped { reason: reason.clone() };
        }
        let names: Vec<String> = outputs.iter().map(|output| output.info.name.clone()).collect();
        if let Some(name) = names.iter().find(|name| self.tensors.contains_key(*name)) {
            return TensorOutcome::Unmatched { reason: format!("another tensor already becomes {name:?}") };
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
    /// The index of the input pattern that matches `name`, if the step applies to its block. Before sizes are known it
    /// applies to all blocks.
    fn slot(&self, name: &str, context: MappingContext) -> Option<(usize, Captures)> {
        let captured = |(slot, input): (usize, &Pattern)| Some((slot, input.captures(name)?));
        let (slot, captures) = self.inputs.iter().enumerate().find_map(captured)?;
        let (Some(sizes), Some(number), false) = (context.sizes, captures.number, self.blocks.is_all()) else {
            return Some((slot, captures));
        };
        self.blocks.contains(number, self.block_count(context.family, sizes), sizes).then_some((slot, captures))
    }

    /// The placeholders of the outputs for inputs with `captures`, once sizes are known.
    fn output_captures(&self, captures: Captures, context: MappingContext) -> Captures {
        match (context.sizes, captures.number) {
            (Some(sizes), Some(number)) if self.mirrored => {
                let mirrored = self.block_count(context.family, sizes).checked_sub(number + 1);
                Captures { number: mirrored.or(captures.number), ..captures }
            }
            _ => captures,
        }
    }

    /// How many blocks its `{n}` counts. The family knows the canonical names of one side and counts 0 for the other's.
    fn block_count(&self, family: &FamilyManifest, sizes: &ConfigValues) -> usize {
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
        match (&self.kind, &self.inputs(captures, group)?[..], &names[..]) {
            (MappingKind::Same(edit, reshape), [input], [name]) => {
                let output = match edit {
                    None => TensorAssembly::whole(input, name),
                    Some(Reorder::SwapHalves) => TensorAssembly::swapped(input, name)?,
                    Some(Reorder::Transpose) => TensorAssembly::transposed(input, name)?,
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
            _ => Err("its rule has another number of inputs or outputs".to_owned()),
        }
    }

    /// The captures that inputs of one application have in common. The copies of all blocks become one tensor, so their
    /// block number does not count.
    fn group_key(&self, captures: Captures) -> Captures {
        match self.kind {
            MappingKind::Pick if !self.outputs.iter().any(Pattern::is_numbered) => {
                Captures { number: None, ..captures }
            }
            _ => captures,
        }
    }

    fn inputs<'a>(&self, captures: Captures, group: &StepInputs<'a>) -> Result<Vec<&'a TensorInfo>, String> {
        if matches!(self.kind, MappingKind::Pick | MappingKind::Drop(_)) {
            return Ok(group.inputs.clone());
        }
        let missing = |pattern: &Pattern| format!("it belongs to {:?}, which is missing", pattern.fill(captures));
        group.slots.iter().zip(&self.inputs).map(|(slot, pattern)| slot.ok_or_else(|| missing(pattern))).collect()
    }

    /// Names of the outputs. If the outputs have a block number and the inputs have none, there is one for every block.
    fn names(&self, captures: Captures, context: MappingContext) -> Vec<String> {
        let captures = self.output_captures(captures, context);
        let mut names = Vec::new();
        for output in &self.outputs {
            if output.is_numbered() && captures.number.is_none() {
                // Before sizes are known, one block is enough to read them from.
                let blocks = context.sizes.map_or(1, |sizes| context.family.blocks_of(output.as_str(), sizes));
                let captures_of = |block| Captures { number: Some(block), ..captures };
                names.extend((0..blocks).map(|block| output.fill(captures_of(block))));
            } else {
                names.push(output.fill(captures));
            }
        }
        names
    }
}

impl Layout {
    /// The name of the canonical tensor `name` in this layout, if it is another.
    pub fn foreign_name(&self, name: &str, prefix: &str, context: MappingContext) -> Option<String> {
        let foreign_by = |step: &MappingStep| {
            let (_, captures) = step.slot(name, context)?;
            Some(format!("{prefix}{}", step.outputs.first()?.fill(step.output_captures(captures, context))))
        };
        self.outward.iter().find_map(foreign_by).filter(|foreign| foreign != name)
    }
}

impl Reshape {
    fn apply(&self, mut output: TensorAssembly, context: MappingContext) -> Result<TensorAssembly, String> {
        let Some(sizes) = context.sizes else { return Ok(output) };
        let shape: Option<Vec<usize>> = match self {
            Self::Keep => return Ok(output),
            Self::Canonical => context.family.expected_shape(&output.info.name, sizes),
            Self::To(shape) => shape.iter().map(|size| size.value(sizes)).collect(),
        };
        let found = &output.info.shape;
        match shape {
            Some(shape) if element_count(&shape).is_some_and(|elements| element_count(found) == Some(elements)) => {
                output.info.shape = shape;
            }
            _ => return Err(format!("its shape {found:?} cannot become {shape:?}")),
        }
        Ok(output)
    }
}

/// (index of the first step that takes `name`, index of the input pattern that matches it, placeholders).
fn find(steps: &[MappingStep], name: &str, context: MappingContext) -> Option<(usize, usize, Captures)> {
    let slot_in =
        |(index, step): (usize, &MappingStep)| step.slot(name, context).map(|(slot, captures)| (index, slot, captures));
    steps.iter().enumerate().find_map(slot_in)
}

fn element_count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size))
}

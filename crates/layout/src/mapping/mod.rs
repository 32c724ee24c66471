//! [`Mapping`]: what a set of rules makes of a list of tensors, by names and shapes alone.

use crate::manifest::config_values::Sizes;
use crate::manifest::family::{FamilyManifest, Layout};
use crate::manifest::pattern::{Captures, Pattern};
use crate::manifest::rule::{Edit, How, Reshape, Step};
use crate::mapping::assembly::Assembly;
use crate::mapping::load_report::Fate;
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
    pub tensors: BTreeMap<String, Assembly>,
    /// What rules drop, by its foreign name: it may still show a setting.
    pub dropped: BTreeMap<String, Assembly>,
    pub fates: BTreeMap<String, Fate>,
}

/// What is known of the model when its tensors are mapped.
#[derive(Clone, Copy)]
pub(crate) struct Scope<'a> {
    pub family: &'a FamilyManifest,
    /// None before the sizes are known.
    pub sizes: Option<&'a Sizes>,
}

/// The tensors that one application of a step takes together.
struct Group<'a> {
    /// By place in the step.
    slots: Vec<Option<&'a TensorInfo>>,
    /// All of them; copies may share a place.
    inputs: Vec<&'a TensorInfo>,
}

impl Mapping {
    /// Applies `steps` to `inputs`: (name as the rules know it, tensor under its own name).
    pub fn new(steps: &[Step], inputs: &[(String, TensorInfo)], scope: Scope) -> Self {
        let mut mapping = Self::default();
        let mut groups: BTreeMap<(usize, Captures), Group> = BTreeMap::new();
        for (name, info) in inputs {
            match find(steps, name, scope) {
                Some((at, slot, captures)) => {
                    let step = &steps[at];
                    if matches!(step.how, How::Drop(_)) {
                        mapping.dropped.insert(name.clone(), Assembly::whole(info, name));
                    }
                    let group = groups.entry((at, step.together(captures))).or_insert_with(|| Group::of(step));
                    group.slots[slot].get_or_insert(info);
                    group.inputs.push(info);
                }
                None => mapping.tell(info, Fate::Unmatched { reason: UNKNOWN.to_owned() }),
            }
        }
        for ((step, captures), group) in groups {
            mapping.perform(&steps[step], captures, &group, scope);
        }
        mapping
    }

    fn perform(&mut self, step: &Step, captures: Captures, group: &Group, scope: Scope) {
        let fate = match step.apply(captures, group, scope) {
            Ok(outputs) => self.put(outputs, &step.how),
            Err(reason) => Fate::Unmatched { reason },
        };
        for info in &group.inputs {
            self.tell(info, fate.clone());
        }
    }

    fn put(&mut self, outputs: Vec<Assembly>, how: &How) -> Fate {
        if let How::Drop(reason) = how {
            return Fate::Skipped { reason: reason.clone() };
        }
        let names: Vec<String> = outputs.iter().map(|output| output.info.name.clone()).collect();
        if let Some(name) = names.iter().find(|name| self.tensors.contains_key(*name)) {
            return Fate::Unmatched { reason: format!("another tensor gives {name:?} already") };
        }
        for output in outputs {
            self.tensors.insert(output.info.name.clone(), output);
        }
        Fate::Used { names }
    }

    fn tell(&mut self, info: &TensorInfo, fate: Fate) {
        if let Entry::Vacant(free) = self.fates.entry(info.name.clone()) {
            free.insert(fate);
        }
    }
}

impl Group<'_> {
    fn of(step: &Step) -> Self {
        Self { slots: vec![None; step.inputs.len()], inputs: Vec::new() }
    }
}

impl Step {
    /// Where `name` stands among the inputs, if the step is for its block; before sizes are known it is for every one.
    fn slot(&self, name: &str, scope: Scope) -> Option<(usize, Captures)> {
        let captured = |(slot, input): (usize, &Pattern)| Some((slot, input.captures(name)?));
        let (slot, captures) = self.inputs.iter().enumerate().find_map(captured)?;
        let (Some(sizes), Some(number), false) = (scope.sizes, captures.number, self.blocks.are_all()) else {
            return Some((slot, captures));
        };
        self.blocks.hold(number, self.count(scope.family, sizes), sizes).then_some((slot, captures))
    }

    /// What the outputs have in their places where the inputs have `captures`, once sizes are known.
    fn across(&self, captures: Captures, scope: Scope) -> Captures {
        match (scope.sizes, captures.number) {
            (Some(sizes), Some(number)) if self.mirrored => {
                let mirrored = self.count(scope.family, sizes).checked_sub(number + 1);
                Captures { number: mirrored.or(captures.number), ..captures }
            }
            _ => captures,
        }
    }

    /// How many blocks it runs over. One side has canonical names; the family counts no blocks by the other's.
    fn count(&self, family: &FamilyManifest, sizes: &Sizes) -> usize {
        let names = self.outputs.iter().chain(&self.inputs).map(Pattern::as_str);
        names.map(|name| family.blocks_of(name, sizes)).max().unwrap_or(0)
    }

    fn apply(&self, captures: Captures, group: &Group, scope: Scope) -> Result<Vec<Assembly>, String> {
        let names = self.names(captures, scope);
        match (&self.how, &self.inputs(captures, group)?[..], &names[..]) {
            (How::Same(edit, reshape), [input], [name]) => {
                let output = match edit {
                    None => Assembly::whole(input, name),
                    Some(Edit::SwapHalves) => Assembly::swapped(input, name)?,
                };
                reshape.apply(output, scope).map(|output| vec![output])
            }
            (How::Split(shares), [input], names) => Assembly::split(input, names, shares),
            (How::Join(shares), inputs, [name]) => Assembly::join(inputs, name, shares).map(|output| vec![output]),
            (How::Copy, [input], names) => Ok(names.iter().map(|name| Assembly::whole(input, name)).collect()),
            (How::Pick, inputs, [name]) => Assembly::picked(inputs, name).map(|output| vec![output]),
            (How::Drop(_), ..) => Ok(Vec::new()),
            _ => Err("its rule does not say what to do with it".to_owned()),
        }
    }

    /// What inputs of one application have in common: copies from all blocks go back to one tensor.
    fn together(&self, captures: Captures) -> Captures {
        match self.how {
            How::Pick if !self.outputs.iter().any(Pattern::is_numbered) => Captures { number: None, ..captures },
            _ => captures,
        }
    }

    fn inputs<'a>(&self, captures: Captures, group: &Group<'a>) -> Result<Vec<&'a TensorInfo>, String> {
        if matches!(self.how, How::Pick | How::Drop(_)) {
            return Ok(group.inputs.clone());
        }
        let partner = |pattern: &Pattern| format!("it belongs to {:?}, which is missing", pattern.fill(captures));
        group.slots.iter().zip(&self.inputs).map(|(slot, pattern)| slot.ok_or_else(|| partner(pattern))).collect()
    }

    /// Names of the outputs; a number that no input has runs over all blocks.
    fn names(&self, captures: Captures, scope: Scope) -> Vec<String> {
        let blocks = |output: &Pattern| scope.sizes.map_or(1, |sizes| scope.family.blocks_of(output.as_str(), sizes));
        let captures = self.across(captures, scope);
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
    pub fn foreign_name(&self, name: &str, prefix: &str, scope: Scope) -> Option<String> {
        let fill = |step: &Step| {
            let (_, captures) = step.slot(name, scope)?;
            Some(format!("{prefix}{}", step.outputs.first()?.fill(step.across(captures, scope))))
        };
        self.outward.iter().find_map(fill).filter(|foreign| foreign != name)
    }
}

impl Reshape {
    fn apply(&self, mut output: Assembly, scope: Scope) -> Result<Assembly, String> {
        let Some(sizes) = scope.sizes else { return Ok(output) };
        let shape: Option<Vec<usize>> = match self {
            Self::Keep => return Ok(output),
            Self::Canonical => scope.family.expected_shape(&output.info.name, sizes),
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

fn find(steps: &[Step], name: &str, scope: Scope) -> Option<(usize, usize, Captures)> {
    let fitting = |(at, step): (usize, &Step)| step.slot(name, scope).map(|(slot, captures)| (at, slot, captures));
    steps.iter().enumerate().find_map(fitting)
}

fn count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, extent| product.checked_mul(*extent))
}

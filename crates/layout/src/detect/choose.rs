//! [`choose`]: the family, layout and prefix whose signature a list of tensor names matches, or the nearest ones.

use crate::detect::hints::Hints;
use crate::error::{LayoutError, Result};
use crate::manifest::Manifests;
use crate::manifest::config::DeclaredConfig;
use crate::manifest::family::{FamilyManifest, Layout};
use crate::manifest::unsupported::{UnsupportedModels, find};
use std::collections::BTreeSet;
use std::sync::Arc;

/// A file that lacks a tensor of a layout's signature is still taken for that layout if the rules match at least this
/// share of its names, so that the missing tensor is reported by name and not as an unknown model. A damaged model has
/// lost a few tensors, and a fine-tune may have added some: a fifth leaves room for both. With fewer matches it would
/// be a guess that the rest of the model is the same.
const NEAR_ENOUGH: f64 = 0.8;
/// How many of the nearest layouts an error lists.
const MOST_NEAREST: usize = 5;

/// A family, layout and prefix that may be the checkpoint's.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub family: Arc<FamilyManifest>,
    pub prefix: String,
    pub evidence: Vec<String>,
    pub notes: Vec<String>,
    /// Index of the layout in the family.
    layout: usize,
    /// Signature tensors that are missing.
    missing: Vec<String>,
    /// A tensor that the layout must not have: it belongs to a similar model.
    forbidden: Option<String>,
}

/// Chooses among all families, or only the one that `hints` name.
pub(crate) fn choose(
    names: &BTreeSet<&str>,
    declared: DeclaredConfig,
    manifests: &Manifests,
    hints: &Hints,
) -> Result<Candidate> {
    let families = allowed_families(manifests, hints)?;
    let candidates: Vec<Candidate> = families.iter().flat_map(|family| candidates(family, names)).collect();
    let (matching, others): (Vec<_>, Vec<_>) = candidates.into_iter().partition(Candidate::matches);
    if let Some(candidate) = one_family(matching, declared)? {
        return Ok(candidate.with_evidence(declared));
    }
    if hints.family.is_none() {
        manifests.unsupported.recognise(names)?;
    }
    nearest(others, names, declared, &manifests.unsupported)
}

impl Candidate {
    /// Its layout.
    pub fn layout(&self) -> &Layout {
        &self.family.layouts[self.layout]
    }

    fn new(family: &Arc<FamilyManifest>, layout: usize, prefix: &str, names: &BTreeSet<&str>) -> Self {
        let Layout { present, absent, .. } = &family.layouts[layout];
        let with_prefix = |pattern: &String| format!("{prefix}{pattern}");
        Self {
            family: family.clone(),
            prefix: prefix.to_owned(),
            evidence: Vec::new(),
            notes: Vec::new(),
            layout,
            missing: present.iter().map(with_prefix).filter(|pattern| find(pattern, names).is_none()).collect(),
            forbidden: absent.iter().find_map(|pattern| find(&with_prefix(pattern), names)).map(str::to_owned),
        }
    }

    /// Whether it has its whole signature and no tensor of a similar model.
    fn matches(&self) -> bool {
        self.missing.is_empty() && self.forbidden.is_none()
    }

    fn has_some(&self) -> bool {
        self.missing.len() < self.layout().present.len()
    }

    fn with_evidence(mut self, declared: DeclaredConfig) -> Self {
        let Layout { name, present, .. } = self.layout();
        let tensors = present.iter().filter(|tensor| !self.missing.contains(&format!("{}{tensor}", self.prefix)));
        let tensors: Vec<&String> = tensors.collect();
        let mut evidence =
            vec![format!("layout {name} from the tensors {tensors:?} with the prefix {:?}", self.prefix)];
        if let Some((class, origin)) = declared.get("_class_name") {
            evidence.push(format!("_class_name {class} from {origin}"));
        }
        self.evidence = evidence;
        self
    }

    /// The share of the tensors, without those of components, whose names the layout's rules match.
    fn share(&self, names: &BTreeSet<&str>, unsupported: &UnsupportedModels) -> f64 {
        let of_model = names.iter().filter(|name| unsupported.component(name).is_none());
        let (count, matched) =
            of_model.fold((0, 0), |(all, matched), name| (all + 1, matched + usize::from(self.knows(name))));
        matched as f64 / f64::from(count.max(1))
    }

    /// Whether a rule of the layout takes the tensor `name`.
    fn knows(&self, name: &str) -> bool {
        let Some(name) = name.strip_prefix(self.prefix.as_str()) else { return false };
        let mut inputs = self.layout().inward.iter().flat_map(|step| &step.inputs);
        inputs.any(|input| input.captures(name).is_some())
    }

    fn describe(&self, share: f64) -> String {
        let Layout { name, present, .. } = self.layout();
        let has = present.len() - self.missing.len();
        let mut text = format!("{} in layout {name}: {has} of {} signature tensors", self.family.name, present.len());
        text += &format!(" (missing {:?}), {:.0}% of the names", self.missing, share * 100.0);
        if let Some(forbidden) = &self.forbidden {
            text += &format!(", but it has {forbidden:?}, which belongs to another model");
        }
        text
    }
}

fn allowed_families(manifests: &Manifests, hints: &Hints) -> Result<Vec<Arc<FamilyManifest>>> {
    let Some(name) = &hints.family else { return Ok(manifests.families.clone()) };
    match manifests.families.iter().find(|family| family.name == *name) {
        Some(family) => Ok(vec![family.clone()]),
        None => Err(LayoutError::NoSuch { kind: "family", name: name.clone(), choices: manifests.families() }),
    }
}

fn candidates(family: &Arc<FamilyManifest>, names: &BTreeSet<&str>) -> Vec<Candidate> {
    let layouts = family.layouts.iter().enumerate();
    let pairs = layouts.flat_map(|(index, layout)| layout.prefixes.iter().map(move |prefix| (index, prefix)));
    pairs.map(|(index, prefix)| Candidate::new(family, index, prefix, names)).collect()
}

/// The first of candidates that fit equally well: manifests list the usual layouts and prefixes first. If the
/// candidates are of several families, the declared class must decide.
fn one_family(mut fitting: Vec<Candidate>, declared: DeclaredConfig) -> Result<Option<Candidate>> {
    let all = family_names(&fitting);
    if all.len() > 1 {
        let class = declared.get("_class_name").and_then(|(class, _)| Some(class.as_str()?.to_owned()));
        fitting.retain(|candidate| class.as_ref().is_some_and(|class| candidate.family.is_class(class)));
    }
    if all.len() > 1 && family_names(&fitting).len() != 1 {
        let reason = format!("it may be any of {all:?}; choose with --family");
        return Err(LayoutError::Ambiguous { what: "the family".to_owned(), reason });
    }
    Ok(fitting.into_iter().next())
}

fn family_names(candidates: &[Candidate]) -> BTreeSet<String> {
    candidates.iter().map(|candidate| candidate.family.name.clone()).collect()
}

/// The candidate that matches the largest share of the names, if that is [`NEAR_ENOUGH`].
fn nearest(
    candidates: Vec<Candidate>,
    names: &BTreeSet<&str>,
    declared: DeclaredConfig,
    unsupported: &UnsupportedModels,
) -> Result<Candidate> {
    let candidates = candidates.into_iter().filter(Candidate::has_some);
    let mut ranked: Vec<(f64, Candidate)> =
        candidates.map(|candidate| (candidate.share(names, unsupported), candidate)).collect();
    ranked.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    match ranked.first() {
        Some((share, best)) if *share >= NEAR_ENOUGH && best.forbidden.is_none() => {
            let share = *share;
            let is_best = |(other, candidate): &(f64, Candidate)| *other == share && candidate.forbidden.is_none();
            let best = ranked.into_iter().filter(is_best).map(|(_, candidate)| candidate).collect();
            let Some(best) = one_family(best, declared)? else {
                return Err(LayoutError::Unknown { nearest: Vec::new() });
            };
            let note = format!("signature tensors are missing: {}", best.describe(share));
            let mut best = best.with_evidence(declared);
            best.notes.push(note);
            Ok(best)
        }
        _ => Err(unknown(&ranked, declared)),
    }
}

fn unknown(ranked: &[(f64, Candidate)], declared: DeclaredConfig) -> LayoutError {
    let shown = ranked.iter().take(MOST_NEAREST);
    let mut nearest: Vec<String> = shown.map(|(share, candidate)| candidate.describe(*share)).collect();
    nearest.extend(declared.get("_class_name").map(|(class, origin)| format!("{origin} has the class {class}")));
    LayoutError::Unknown { nearest }
}

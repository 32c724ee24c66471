//! [`choose`]: the family, layout and prefix whose signature a list of names bears, or what came near.

use crate::detect::hints::Hints;
use crate::error::{LayoutError, Result};
use crate::manifest::Manifests;
use crate::manifest::config::DeclaredConfig;
use crate::manifest::family::{FamilyManifest, Layout};
use crate::manifest::unsupported::{UnsupportedModels, find};
use std::collections::BTreeSet;
use std::sync::Arc;

/// A model that lost a tensor or two of its signature is still recognised by this share of the others.
const NEAR_ENOUGH: f64 = 0.8;
const MOST_NEAR: usize = 5;

/// A family and layout that these names may be.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub family: Arc<FamilyManifest>,
    pub prefix: String,
    pub evidence: Vec<String>,
    pub notes: Vec<String>,
    layout: usize,
    lacking: Vec<String>,
    holding: Option<String>,
}

/// Chooses among all families, or among those that `hints` leave.
pub(crate) fn choose(
    names: &BTreeSet<&str>,
    declared: DeclaredConfig,
    manifests: &Manifests,
    hints: &Hints,
) -> Result<Candidate> {
    manifests.known.refuse(names)?;
    let families = allowed(manifests, hints)?;
    let candidates: Vec<Candidate> = families.iter().flat_map(|family| candidates(family, names)).collect();
    let (whole, near): (Vec<_>, Vec<_>) = candidates.into_iter().partition(Candidate::is_whole);
    if let Some(candidate) = one_family(whole, declared)? {
        return Ok(candidate.with_evidence(declared));
    }
    if hints.family.is_none() {
        manifests.known.recognise(names)?;
    }
    nearest(near, names, declared, &manifests.known)
}

impl Candidate {
    /// Its layout.
    pub fn layout(&self) -> &Layout {
        &self.family.layouts[self.layout]
    }

    fn new(family: &Arc<FamilyManifest>, layout: usize, prefix: &str, names: &BTreeSet<&str>) -> Self {
        let Layout { present, absent, .. } = &family.layouts[layout];
        let with_prefix = |pattern: &String| format!("{prefix}{pattern}");
        let lacking = present.iter().map(with_prefix).filter(|pattern| find(pattern, names).is_none()).collect();
        let holding = absent.iter().find_map(|pattern| find(&with_prefix(pattern), names)).map(str::to_owned);
        let (family, prefix) = (family.clone(), prefix.to_owned());
        Self { family, prefix, layout, lacking, holding, evidence: Vec::new(), notes: Vec::new() }
    }

    fn is_whole(&self) -> bool {
        self.lacking.is_empty() && self.holding.is_none()
    }

    fn has_some(&self) -> bool {
        self.lacking.len() < self.layout().present.len()
    }

    fn with_evidence(mut self, declared: DeclaredConfig) -> Self {
        let Layout { name, present, .. } = self.layout();
        let tensors = present.iter().filter(|tensor| !self.lacking.contains(&format!("{}{tensor}", self.prefix)));
        let tensors: Vec<&String> = tensors.collect();
        let mut evidence = vec![format!("layout {name} by the tensors {tensors:?} under the prefix {:?}", self.prefix)];
        if let Some((class, origin)) = declared.get("_class_name") {
            evidence.push(format!("_class_name {class} from {origin}"));
        }
        self.evidence = evidence;
        self
    }

    /// Share of the tensors, components aside, that the layout's rules know.
    fn share(&self, names: &BTreeSet<&str>, known: &UnsupportedModels) -> f64 {
        let ours = names.iter().filter(|name| known.component(name).is_none());
        let steps = &self.layout().inward;
        let understood = |name: &&str| {
            let name = name.strip_prefix(self.prefix.as_str());
            name.is_some_and(|name| {
                steps.iter().any(|step| step.inputs.iter().any(|input| input.captures(name).is_some()))
            })
        };
        let (count, understood) =
            ours.fold((0, 0), |(all, some), name| (all + 1, some + usize::from(understood(name))));
        understood as f64 / f64::from(count.max(1))
    }

    fn describe(&self, share: f64) -> String {
        let Layout { name, present, .. } = self.layout();
        let has = present.len() - self.lacking.len();
        let mut text = format!("{} in layout {name}: {has} of {} signature tensors", self.family.name, present.len());
        text += &format!(" (missing {:?}), {:.0}% of the names", self.lacking, share * 100.0);
        if let Some(holding) = &self.holding {
            text += &format!(", but it has {holding:?}, which is another model's");
        }
        text
    }
}

fn allowed(manifests: &Manifests, hints: &Hints) -> Result<Vec<Arc<FamilyManifest>>> {
    let Some(name) = &hints.family else { return Ok(manifests.families.clone()) };
    match manifests.families.iter().find(|family| family.name == *name) {
        Some(family) => Ok(vec![family.clone()]),
        None => Err(LayoutError::NoSuch { kind: "family", name: name.clone(), choices: manifests.families() }),
    }
}

fn candidates(family: &Arc<FamilyManifest>, names: &BTreeSet<&str>) -> Vec<Candidate> {
    let layouts = family.layouts.iter().enumerate();
    let pairs = layouts.flat_map(|(at, layout)| layout.prefixes.iter().map(move |prefix| (at, prefix)));
    pairs.map(|(at, prefix)| Candidate::new(family, at, prefix, names)).collect()
}

/// The first of candidates that fit equally well. Where they are of several families, the declared class must be one's.
fn one_family(mut fitting: Vec<Candidate>, declared: DeclaredConfig) -> Result<Option<Candidate>> {
    let families = |fitting: &[Candidate]| -> BTreeSet<String> {
        fitting.iter().map(|candidate| candidate.family.name.clone()).collect()
    };
    let all = families(&fitting);
    if all.len() > 1 {
        let class = declared.get("_class_name").and_then(|(class, _)| Some(class.as_str()?.to_owned()));
        fitting.retain(|candidate| class.as_ref().is_some_and(|class| candidate.family.is_class(class)));
    }
    if all.len() > 1 && families(&fitting).len() != 1 {
        let reason = format!("it may be any of {all:?}; choose with --family");
        return Err(LayoutError::Ambiguous { what: "the family".to_owned(), reason });
    }
    Ok(fitting.into_iter().next())
}

/// The candidate that understands most names, if it understands nearly all.
fn nearest(
    near: Vec<Candidate>,
    names: &BTreeSet<&str>,
    declared: DeclaredConfig,
    known: &UnsupportedModels,
) -> Result<Candidate> {
    let near = near.into_iter().filter(Candidate::has_some);
    let mut ranked: Vec<(f64, Candidate)> = near.map(|candidate| (candidate.share(names, known), candidate)).collect();
    ranked.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    match ranked.first() {
        Some((share, best)) if *share >= NEAR_ENOUGH && best.holding.is_none() => {
            let share = *share;
            let equal = |(other, candidate): &(f64, Candidate)| *other == share && candidate.holding.is_none();
            let best = ranked.into_iter().filter(equal).map(|(_, candidate)| candidate).collect();
            let Some(best) = one_family(best, declared)? else { return Err(LayoutError::Unknown { near: Vec::new() }) };
            let note = format!("not every signature tensor is there: {}", best.describe(share));
            let mut best = best.with_evidence(declared);
            best.notes.push(note);
            Ok(best)
        }
        _ => {
            let mut near: Vec<String> =
                ranked.iter().take(MOST_NEAR).map(|(share, one)| one.describe(*share)).collect();
            near.extend(declared.get("_class_name").map(|(class, origin)| format!("{origin} says {class}")));
            Err(LayoutError::Unknown { near })
        }
    }
}

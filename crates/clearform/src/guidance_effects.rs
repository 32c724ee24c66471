//! [`GuidanceEffects`]: which guidance settings act on a model. Those that do not are said, and not recorded.

use clearform_models::GuidanceKind;
use clearform_runtime::GuidanceScales;

/// What the user set.
#[derive(Debug, Clone, Copy, Default)]
pub struct GivenGuidance {
    /// A guidance scale.
    pub scale: bool,
    /// A negative prompt.
    pub negative_prompt: bool,
    /// A number of guided channels.
    pub channels: bool,
}

/// What acts.
#[derive(Debug, Default, PartialEq)]
pub struct GuidanceEffects {
    /// The guidance scale; `None` if the model takes none.
    pub guidance: Option<f64>,
    /// The classifier-free scale of a model that may embed one; `None` for the others.
    pub true_cfg_scale: Option<f64>,
    /// Whether the negative prompt acts.
    pub negative_prompt: bool,
    /// What was set and does not act.
    pub notes: Vec<String>,
}

impl GuidanceEffects {
    /// What acts of `given` with these scales. `embeds`: the transformer takes the scale as an input.
    pub fn of(given: GivenGuidance, scales: GuidanceScales, kind: &GuidanceKind, embeds: bool) -> Self {
        match kind {
            GuidanceKind::Embedded => Self::embedded(given, scales, embeds),
            GuidanceKind::ClassifierFree { .. } => Self::classifier_free(given, scales.guidance),
        }
    }

    /// As diffusers' FluxPipeline: classifier-free only with a negative prompt and a scale above 1.
    fn embedded(given: GivenGuidance, scales: GuidanceScales, embeds: bool) -> Self {
        let scale = scales.true_cfg;
        let acts = given.negative_prompt && scale > 1.0;
        let notes = [
            (given.scale && !embeds).then(|| "--guidance has no effect: this model takes no guidance scale".to_owned()),
            (given.negative_prompt && !acts)
                .then(|| format!("--negative-prompt has no effect with --true-cfg-scale {scale}: it acts above 1")),
            (scale != 1.0 && !given.negative_prompt)
                .then(|| format!("--true-cfg-scale {scale} has no effect without --negative-prompt")),
        ];
        Self {
            guidance: embeds.then_some(scales.guidance),
            true_cfg_scale: Some(if acts { scale } else { 1.0 }),
            negative_prompt: acts,
            notes: notes.into_iter().flatten().collect(),
        }
    }

    fn classifier_free(given: GivenGuidance, scale: f64) -> Self {
        let acts = scale > 1.0;
        let note = |what: &str| format!("{what} has no effect: classifier-free guidance acts above a scale of 1");
        let notes = [
            (given.scale && scale != 1.0).then(|| note(&format!("--guidance {scale}"))),
            given.negative_prompt.then(|| note("--negative-prompt")),
            given.channels.then(|| note("--guided-channels")),
        ];
        Self {
            guidance: Some(if acts { scale } else { 1.0 }),
            true_cfg_scale: None,
            negative_prompt: given.negative_prompt && acts,
            notes: notes.into_iter().flatten().filter(|_| !acts).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clearform_models::Prompt;

    /// Every combination: what acts is recorded, and what was set and does not act is said.
    #[test]
    fn what_does_not_act_is_said_and_not_recorded() {
        let free = GuidanceKind::ClassifierFree { unconditional: Prompt::Text(String::new()), channels: None };
        let all = (0..8u8).map(|bits| [1, 2, 4].map(|bit| bits & bit != 0));
        for [scale, negative_prompt, channels] in all {
            let given = GivenGuidance { scale, negative_prompt, channels };
            for (guidance, true_cfg, embeds) in
                [(0.5, 0.5, true), (1.0, 1.0, false), (3.5, 4.0, true), (3.5, 4.0, false)]
            {
                let scales = GuidanceScales { guidance, true_cfg };
                let found = GuidanceEffects::of(given, scales, &GuidanceKind::Embedded, embeds);
                let says = |flag: &str| found.notes.iter().any(|note| note.starts_with(flag));
                assert_eq!(found.guidance, embeds.then_some(guidance));
                assert_eq!(says("--guidance "), scale && !embeds, "{found:?}");
                let acts = negative_prompt && true_cfg > 1.0;
                assert_eq!(
                    (found.negative_prompt, found.true_cfg_scale),
                    (acts, Some(if acts { true_cfg } else { 1.0 }))
                );
                assert_eq!(says("--negative-prompt"), negative_prompt && !acts, "{found:?}");
                assert_eq!(says("--true-cfg-scale"), !negative_prompt && true_cfg != 1.0, "{found:?}");

                let found = GuidanceEffects::of(given, GuidanceScales::new(guidance), &free, false);
                let says = |flag: &str| found.notes.iter().any(|note| note.starts_with(flag));
                let acts = guidance > 1.0;
                assert_eq!((found.guidance, found.true_cfg_scale), (Some(if acts { guidance } else { 1.0 }), None));
                assert_eq!(found.negative_prompt, negative_prompt && acts);
                assert_eq!(says("--negative-prompt"), negative_prompt && !acts, "{found:?}");
                assert_eq!(says("--guided-channels"), channels && !acts, "{found:?}");
                assert_eq!(says("--guidance "), scale && guidance == 0.5, "{found:?}");
            }
        }
    }
}

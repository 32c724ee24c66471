//! [`GenerationParameters`]: what an image was made with, as image files record it: under keys of our own, and as the
//! text that AUTOMATIC1111's web UI writes and many programs read.

use clearform_models::ImageSize;
use std::fmt::Write as _;
use std::str::FromStr;

/// The parameters of an image, enough to generate it again. Settings that had no effect are not among them.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationParameters {
    /// Prompt or class.
    pub prompt: String,
    /// Negative prompt; empty if there was none.
    pub negative_prompt: String,
    /// Seed of the noise of the whole batch.
    pub seed: u64,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale: embedded in families that take it as an input, classifier-free in the others; `None` if the
    /// model takes none.
    pub guidance: Option<f64>,
    /// Classifier-free guidance scale of families that may embed one; `None` for the others.
    pub true_cfg_scale: Option<f64>,
    /// Width and height.
    pub size: ImageSize,
    /// The model's name.
    pub model: String,
    /// The attention plan that the transformer ran with.
    pub attention: String,
    /// Adapters, as command-line options; empty if there were none.
    pub adapters: String,
    /// Settings of the computation that may change the last bits of pixels and are not the defaults, as command-line
    /// options; empty if there were none.
    pub computation: String,
    /// Position in the batch, from 1.
    pub number: usize,
    /// Number of images in the batch.
    pub batch: usize,
}

/// What comes before the negative prompt in the web UI's text.
const NEGATIVE: &str = "Negative prompt:";

impl GenerationParameters {
    /// Our own keys and their texts.
    pub(crate) fn texts(&self) -> Vec<(String, String)> {
        let number = |key: &'static str, value: Option<f64>| value.map(|value| (key, value.to_string()));
        let texts = [
            ("Software", software()),
            ("prompt", self.prompt.clone()),
            ("negative_prompt", self.negative_prompt.clone()),
            ("seed", self.seed.to_string()),
            ("steps", self.steps.to_string()),
            ("size", self.size_text()),
            ("model", self.model.clone()),
            ("attention", self.attention.clone()),
            ("adapters", self.adapters.clone()),
            ("computation", self.computation.clone()),
            ("picture", self.place()),
        ];
        let scales = [number("guidance", self.guidance), number("true_cfg_scale", self.true_cfg_scale)];
        let all = texts.into_iter().chain(scales.into_iter().flatten());
        all.map(|(key, text)| (key.to_owned(), text)).collect()
    }

    /// The inverse of [`Self::texts`].
    pub(crate) fn from_texts(texts: &[(String, String)]) -> Option<Self> {
        let text = |wanted: &str| Some(texts.iter().find(|(key, _)| key == wanted)?.1.as_str());
        let number = |wanted: &str| text(wanted)?.parse().ok();
        let (width, height) = parse_two(text("size")?, 'x')?;
        let (place, batch) = parse_two(text("picture")?, '/')?;
        Some(Self {
            prompt: text("prompt")?.to_owned(),
            negative_prompt: text("negative_prompt")?.to_owned(),
            seed: text("seed")?.parse().ok()?,
            steps: text("steps")?.parse().ok()?,
            guidance: number("guidance"),
            true_cfg_scale: number("true_cfg_scale"),
            size: ImageSize { height, width },
            model: text("model")?.to_owned(),
            attention: text("attention")?.to_owned(),
            adapters: text("adapters").unwrap_or_default().to_owned(),
            computation: text("computation").unwrap_or_default().to_owned(),
            number: place,
            batch,
        })
    }

    /// The text that the web UI writes under the key `parameters`: the prompt, the negative prompt, and a line of
    /// settings whose keys are the web UI's where it has one.
    pub fn infotext(&self) -> String {
        let mut text = self.prompt.clone();
        if !self.negative_prompt.is_empty() {
            let _ = write!(text, "\n{NEGATIVE} {}", self.negative_prompt);
        }
        let settings = self.settings().into_iter().map(|(key, value)| format!("{key}: {}", quoted(&value)));
        let _ = write!(text, "\n{}", settings.collect::<Vec<_>>().join(", "));
        text
    }

    fn settings(&self) -> Vec<(&'static str, String)> {
        let classifier_free = self.true_cfg_scale.or(self.guidance);
        let embedded = self.guidance.filter(|_| self.true_cfg_scale.is_some());
        // The web UI has one key for both kinds of classifier-free scales.
        let number = |key, value: Option<f64>| value.map(|value| (key, value.to_string()));
        let named = |key, value: &str| (!value.is_empty()).then(|| (key, value.to_owned()));
        let settings = [
            Some(("Steps", self.steps.to_string())),
            number("CFG scale", classifier_free),
            number("Distilled CFG Scale", embedded),
            number("True CFG scale", self.true_cfg_scale),
            Some(("Seed", self.seed.to_string())),
            Some(("Size", self.size_text())),
            named("Model", &self.model),
            named("Attention", &self.attention),
            named("Adapters", &self.adapters),
            named("Computation", &self.computation),
            Some(("Picture", self.place())),
            Some(("Version", software())),
        ];
        settings.into_iter().flatten().collect()
    }

    /// Reads [`Self::infotext`], or what the web UI wrote; `None` if the text lacks steps, seed or size.
    pub fn from_infotext(text: &str) -> Option<Self> {
        let (texts, settings) = text.trim_end().rsplit_once('\n').unwrap_or(("", text.trim()));
        let settings = parse_settings(settings);
        let setting = |wanted: &str| Some(settings.iter().find(|(key, _)| key == wanted)?.1.as_str());
        let number = |wanted: &str| setting(wanted)?.parse().ok();
        let (prompt, negative) = match texts.strip_prefix(NEGATIVE) {
            Some(negative) => ("", negative),
            None => texts.split_once(&format!("\n{NEGATIVE}")).unwrap_or((texts, "")),
        };
        let (width, height) = parse_two(setting("Size")?, 'x')?;
        let (place, batch) = setting("Picture").and_then(|text| parse_two(text, '/')).unwrap_or((1, 1));
        let embedded: Option<f64> = number("Distilled CFG Scale");
        let classifier_free: Option<f64> = number("CFG scale");
        let true_cfg = number("True CFG scale").or(classifier_free.filter(|_| embedded.is_some()));
        Some(Self {
            prompt: prompt.to_owned(),
            negative_prompt: negative.trim().to_owned(),
            seed: setting("Seed")?.parse().ok()?,
            steps: setting("Steps")?.parse().ok()?,
            guidance: embedded.or(classifier_free.filter(|_| true_cfg.is_none())),
            true_cfg_scale: true_cfg,
            size: ImageSize { height, width },
            model: setting("Model").unwrap_or_default().to_owned(),
            attention: setting("Attention").unwrap_or_default().to_owned(),
            adapters: setting("Adapters").unwrap_or_default().to_owned(),
            computation: setting("Computation").unwrap_or_default().to_owned(),
            number: place,
            batch,
        })
    }

    fn size_text(&self) -> String {
        format!("{}x{}", self.size.width, self.size.height)
    }

    fn place(&self) -> String {
        format!("{}/{}", self.number, self.batch)
    }
}

fn software() -> String {
    format!("clearform {}", env!("CARGO_PKG_VERSION"))
}

/// `value` as a JSON string if the web UI would not read it otherwise.
fn quoted(value: &str) -> String {
    let needs_quotes = value.contains([',', '\n', ':', '"']);
    if needs_quotes { serde_json::Value::from(value).to_string() } else { value.to_owned() }
}

/// `KEY: VALUE` pairs separated by commas; a value may be a JSON string.
fn parse_settings(line: &str) -> Vec<(String, String)> {
    let mut settings = Vec::new();
    let mut rest = line;
    while let Some((key, after)) = rest.split_once(':') {
        let after = after.trim_start();
        let mut strings = serde_json::Deserializer::from_str(after).into_iter::<String>();
        let (value, left) = match strings.next() {
            Some(Ok(value)) => (value, after[strings.byte_offset()..].trim_start_matches(',')),
            _ => after.split_once(',').map_or((after.to_owned(), ""), |(value, left)| (value.to_owned(), left)),
        };
        settings.push((key.trim().to_owned(), value.trim().to_owned()));
        rest = left;
    }
    settings
}

/// Two values with `separator` between them, as in "640x480".
fn parse_two<T: FromStr>(text: &str, separator: char) -> Option<(T, T)> {
    let (first, second) = text.split_once(separator)?;
    Some((first.parse().ok()?, second.parse().ok()?))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Parameters with every setting.
    pub(crate) fn parameters(prompt: &str) -> GenerationParameters {
        GenerationParameters {
            prompt: prompt.to_owned(),
            negative_prompt: String::new(),
            seed: u64::MAX,
            steps: 28,
            guidance: Some(3.5),
            true_cfg_scale: Some(1.0),
            size: ImageSize { height: 2, width: 3 },
            model: "mini-flux".to_owned(),
            attention: "clear:r=4".to_owned(),
            adapters: "--lora style:0.8".to_owned(),
            computation: "--dtype f16".to_owned(),
            number: 2,
            batch: 4,
        }
    }

    #[test]
    fn the_text_of_the_web_ui_reads_back() {
        let plain = parameters("a fox, sitting");
        let cases = [
            plain.clone(),
            GenerationParameters { negative_prompt: "blurred: \"soft\", grey".into(), ..plain.clone() },
            GenerationParameters { prompt: "two\nlines: a, b".into(), guidance: None, ..plain.clone() },
            GenerationParameters { prompt: String::new(), true_cfg_scale: None, ..plain.clone() },
            GenerationParameters { guidance: None, true_cfg_scale: Some(4.0), ..plain.clone() },
            GenerationParameters { guidance: None, true_cfg_scale: None, adapters: String::new(), ..plain },
        ];
        for case in cases {
            let text = case.infotext();
            assert_eq!(GenerationParameters::from_infotext(&text).as_ref(), Some(&case), "{text}");
            assert_eq!(GenerationParameters::from_texts(&case.texts()), Some(case));
        }
    }

    /// As AUTOMATIC1111's web UI and Forge write it.
    #[test]
    fn text_of_other_programs_is_read() {
        let text = "a red apple\nNegative prompt: blurred\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 5, Size: \
                    512x768, Model hash: 6ce0161689, Model: v1-5, Lora hashes: \"a: 1, b: 2\", Version: v1.10.1";
        let read = GenerationParameters::from_infotext(text).unwrap();
        assert_eq!((read.prompt.as_str(), read.negative_prompt.as_str()), ("a red apple", "blurred"));
        assert_eq!((read.steps, read.seed, read.guidance, read.true_cfg_scale), (20, 5, Some(7.0), None));
        assert_eq!((read.size, read.model.as_str()), (ImageSize { height: 768, width: 512 }, "v1-5"));
        let forge = "a\nSteps: 20, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 5, Size: 512x768";
        let read = GenerationParameters::from_infotext(forge).unwrap();
        assert_eq!((read.guidance, read.true_cfg_scale), (Some(3.5), Some(1.0)));
        for other in ["", "a red apple", "Steps: 20, Seed: 5", "Steps: x, Seed: 5, Size: 1x1", "a: \"b"] {
            assert_eq!(GenerationParameters::from_infotext(other), None, "{other}");
        }
    }
}

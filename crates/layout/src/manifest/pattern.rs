//! [`Pattern`]: a tensor name with placeholders for the block's number, a number within the block, and "weight" or
//! "bias".

/// Digits of a block number. Real models have fewer than a hundred blocks; a longer number means something else.
const MOST_DIGITS: usize = 4;

/// A name with the placeholders `{n}` (block number), `{m}` (number within the block) and `{p}` (weight or bias).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pattern {
    text: String,
    segments: Vec<PatternSegment>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum PatternSegment {
    Literal(String),
    /// `{n}`
    Block,
    /// `{m}`
    Inner,
    /// `{p}`
    Parameter,
}

/// The values of a pattern's placeholders.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Captures {
    pub number: Option<usize>,
    pub inner: Option<usize>,
    pub parameter: Option<ParameterKind>,
}

/// A parameter of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ParameterKind {
    Weight,
    Bias,
}

impl ParameterKind {
    pub const ALL: [Self; 2] = [Self::Weight, Self::Bias];

    fn name(self) -> &'static str {
        match self {
            Self::Weight => "weight",
            Self::Bias => "bias",
        }
    }
}

impl Pattern {
    /// Parses a pattern. Braces around anything else are literal.
    pub fn new(text: &str) -> Self {
        let mut segments = Vec::new();
        let mut rest = text;
        while let Some(start) = rest.find('{') {
            let (literal, tail) = rest.split_at(start);
            let placeholder = match tail.get(..3) {
                Some("{n}") => PatternSegment::Block,
                Some("{m}") => PatternSegment::Inner,
                Some("{p}") => PatternSegment::Parameter,
                _ => break,
            };
            segments.extend([PatternSegment::Literal(literal.to_owned()), placeholder]);
            rest = &tail[3..];
        }
        segments.push(PatternSegment::Literal(rest.to_owned()));
        Self { text: text.to_owned(), segments }
    }

    /// The values of the placeholders in `name`, if the pattern matches all of it.
    pub fn captures(&self, name: &str) -> Option<Captures> {
        self.captures_start(name).filter(|(_, rest)| rest.is_empty()).map(|(captures, _)| captures)
    }

    /// The values of the placeholders and the rest of `name`, if the pattern matches its beginning.
    pub fn captures_start<'a>(&self, name: &'a str) -> Option<(Captures, &'a str)> {
        let mut captures = Captures::default();
        let mut rest = name;
        for segment in &self.segments {
            rest = segment.take(rest, &mut captures)?;
        }
        Some((captures, rest))
    }

    /// The name with these values in the placeholders.
    pub fn fill(&self, captures: Captures) -> String {
        let text_of = |segment: &PatternSegment| match segment {
            PatternSegment::Literal(literal) => literal.clone(),
            PatternSegment::Block => captures.number.map_or_else(String::new, |number| number.to_string()),
            PatternSegment::Inner => captures.inner.map_or_else(String::new, |number| number.to_string()),
            PatternSegment::Parameter => captures.parameter.map_or("", ParameterKind::name).to_owned(),
        };
        self.segments.iter().map(text_of).collect()
    }

    /// The pattern as written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it has the placeholder `{n}`.
    pub fn is_numbered(&self) -> bool {
        self.segments.contains(&PatternSegment::Block)
    }

    /// Whether it has the placeholder `{p}`.
    pub fn is_layer(&self) -> bool {
        self.segments.contains(&PatternSegment::Parameter)
    }
}

impl PatternSegment {
    /// Matches the beginning of `text` and returns the rest.
    fn take<'a>(&self, text: &'a str, captures: &mut Captures) -> Option<&'a str> {
        match self {
            Self::Literal(literal) => text.strip_prefix(literal.as_str()),
            Self::Block => take_equal(text, &mut captures.number),
            Self::Inner => take_equal(text, &mut captures.inner),
            Self::Parameter => {
                let parameter = ParameterKind::ALL.into_iter().find(|parameter| text.starts_with(parameter.name()))?;
                captures.parameter = Some(parameter);
                text.strip_prefix(parameter.name())
            }
        }
    }
}

/// The rest of `text` after a number, which must equal the one captured before, if there is one.
fn take_equal<'a>(text: &'a str, captured: &mut Option<usize>) -> Option<&'a str> {
    let (number, rest) = take_number(text)?;
    (*captured.get_or_insert(number) == number).then_some(rest)
}

/// A number without leading zeros, and the rest of `text`.
fn take_number(text: &str) -> Option<(usize, &str)> {
    let end = text.bytes().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    let canonical = (1..=MOST_DIGITS).contains(&end) && (end == 1 || !digits.starts_with('0'));
    canonical.then(|| digits.parse().ok()).flatten().map(|number| (number, rest))
}

/// Whether `name` matches `pattern`, in which each `*` matches any text.
pub fn glob(pattern: &str, name: &str) -> bool {
    let Some((start, mut rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(start) else { return false };
    while let Some((middle, tail)) = rest.split_once('*') {
        let Some(at) = name.find(middle) else { return false };
        (name, rest) = (&name[at + middle.len()..], tail);
    }
    name.ends_with(rest)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn captures_and_fills() {
        let pattern = Pattern::new("blocks.{n}.attn.{p}");
        let captures = pattern.captures("blocks.12.attn.bias").unwrap();
        assert_eq!(captures, Captures { number: Some(12), inner: None, parameter: Some(ParameterKind::Bias) });
        assert_eq!(pattern.fill(captures), "blocks.12.attn.bias");
        for wrong in ["blocks.012.attn.bias", "blocks..attn.bias", "blocks.12345.attn.bias", "blocks.1.attn.biases"] {
            assert_eq!(pattern.captures(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn block_numbers_and_inner_numbers_are_independent() {
        let pattern = Pattern::new("up.{n}.block.{m}.conv.{p}");
        let captures = pattern.captures("up.3.block.1.conv.weight").unwrap();
        assert_eq!((captures.number, captures.inner), (Some(3), Some(1)));
        assert_eq!(pattern.fill(captures), "up.3.block.1.conv.weight");
        assert_eq!(pattern.captures("up.3.block.x.conv.weight"), None);
    }

    #[test]
    fn stars_match_any_text() {
        for (pattern, name, fits) in [
            ("a.*", "a.b", true),
            ("*.b", "a.b", true),
            ("*.b", "ab", false),
            ("a*c*e", "abcde", true),
            ("a*c*e", "abde", false),
            ("ab*b", "ab", false),
            ("a", "ab", false),
        ] {
            assert_eq!(glob(pattern, name), fits, "{pattern} {name}");
        }
    }
}

//! [`Strength`]: how strongly an adapter is applied, as a whole and to blocks whose names hold some text.

/// A factor for all, and others for some blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct Strength {
    /// For everything.
    pub whole: f64,
    /// Further factors for parameters whose names hold the text: "double", "single_blocks.3", "text_encoder".
    pub blocks: Vec<(String, f64)>,
}

impl Default for Strength {
    fn default() -> Self {
        Self { whole: 1.0, blocks: Vec::new() }
    }
}

impl Strength {
    /// The factor of a parameter of `part` with these names in different layouts: that of the longest text that fits,
    /// times the whole's.
    pub(crate) fn of(&self, part: &str, names: &[&str]) -> f64 {
        let names: Vec<String> = names.iter().map(|name| format!("{part}.{name}")).collect();
        let fitting = self.blocks.iter().filter(|(text, _)| names.iter().any(|name| holds(name, text)));
        let longest = fitting.max_by_key(|(text, _)| text.len());
        self.whole * longest.map_or(1.0, |(_, factor)| *factor)
    }

    /// The texts that fit none of `names`, each with its part in front.
    pub(crate) fn idle<'a>(&'a self, names: &[String]) -> Vec<&'a str> {
        let idle = self.blocks.iter().filter(|(text, _)| !names.iter().any(|name| holds(name, text)));
        idle.map(|(text, _)| text.as_str()).collect()
    }
}

/// Whether `name` holds `text`; a number at its end is whole, so that block 1 is not block 11.
fn holds(name: &str, text: &str) -> bool {
    let is_digit = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_digit);
    name.match_indices(text).any(|(at, _)| {
        let (last, next) = (text.as_bytes().last(), name.as_bytes().get(at + text.len()));
        !(is_digit(last) && is_digit(next))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_text_that_fits_decides() {
        let blocks = [("double", 0.5), ("double_blocks.1", 2.0), ("text_encoder", 0.0)];
        let strength = Strength { whole: 0.8, blocks: blocks.map(|(text, factor)| (text.to_owned(), factor)).into() };
        let of = |part, number| {
            let canonical = format!("transformer_blocks.{number}.attn.to_q.weight");
            strength.of(part, &[&canonical, &format!("double_blocks.{number}.img_attn.qkv.weight")])
        };
        assert_eq!(of("transformer", 0), 0.4);
        assert_eq!(of("transformer", 1), 1.6);
        assert_eq!(of("transformer", 11), 0.4);
        assert_eq!(strength.of("text_encoder_2", &["encoder.block.0"]), 0.0);
        assert_eq!(strength.of("transformer", &["proj_out.weight"]), 0.8);
        assert_eq!(strength.idle(&["transformer.double_blocks.0".to_owned()]), ["double_blocks.1", "text_encoder"]);
    }
}

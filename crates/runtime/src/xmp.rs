//! XMP packets with the parameters of an image: the web UI's text as its description, for other programs, and all
//! parameters under our own keys, as JSON.

use crate::GenerationParameters;

/// The element with our own keys.
const OPEN: &str = "<clearform:parameters>";
const CLOSE: &str = "</clearform:parameters>";

/// What is written otherwise in XML. Each ampersand first, and last when it is read.
const ESCAPES: [(&str, &str); 3] = [("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")];

/// A packet with `parameters`.
pub fn packet(parameters: &GenerationParameters) -> String {
    let description = escaped(&parameters.infotext());
    let own = escaped(&serde_json::Value::from_iter(parameters.texts()).to_string());
    format!(
        "<?xpacket begin=\"\u{feff}\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?><x:xmpmeta xmlns:x=\"adobe:ns:meta/\">\
         <rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\"><rdf:Description rdf:about=\"\" \
         xmlns:dc=\"http://purl.org/dc/elements/1.1/\" xmlns:clearform=\"urn:clearform\"><dc:description><rdf:Alt>\
         <rdf:li xml:lang=\"x-default\">{description}</rdf:li></rdf:Alt></dc:description>{OPEN}{own}{CLOSE}\
         </rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end=\"w\"?>"
    )
}

/// The parameters in a [`packet`]; `None` of those of other programs.
pub fn parameters(packet: &[u8]) -> Option<GenerationParameters> {
    let (_, after) = std::str::from_utf8(packet).ok()?.split_once(OPEN)?;
    let (own, _) = after.split_once(CLOSE)?;
    let json = ESCAPES.iter().rev().fold(own.to_owned(), |text, (plain, escape)| text.replace(escape, plain));
    let texts: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&json).ok()?;
    let texts = texts.into_iter().filter_map(|(key, value)| Some((key, value.as_str()?.to_owned())));
    GenerationParameters::from_texts(&texts.collect::<Vec<_>>())
}

fn escaped(text: &str) -> String {
    ESCAPES.iter().fold(text.to_owned(), |text, (plain, escape)| text.replace(plain, escape))
}

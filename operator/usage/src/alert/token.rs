//! The secret in the address of an account's feed.

use sha2::{Digest as _, Sha256};
use std::fmt::{self, Debug, Formatter};
use subtle::ConstantTimeEq as _;

/// 256 random bits, as 64 hexadecimal digits.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// A new one.
    ///
    /// # Errors
    /// The machine gives no random numbers.
    pub fn random() -> Result<Token, getrandom::Error> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Token(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// The text, if it can be one.
    pub(crate) fn read(text: &str) -> Option<Token> {
        let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        (text.len() == 64 && text.bytes().all(digit)).then(|| Token(text.into()))
    }

    /// For the address.
    pub fn secret(&self) -> &str {
        &self.0
    }

    /// Whether it is the same, which takes the same time whatever the other one is.
    pub(crate) fn is(&self, other: &Token) -> bool {
        Sha256::digest(&self.0).ct_eq(&Sha256::digest(&other.0)).into()
    }
}

/// Not what it is: it must not get into a log.
impl Debug for Token {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_unlike() {
        let (one, other) = (Token::random().unwrap(), Token::random().unwrap());
        assert!(one.is(&one.clone()) && !one.is(&other));
        assert_eq!(Token::read(one.secret()), Some(one.clone()));
        assert!(!format!("{one:?}").contains(one.secret()));
        let upper = one.secret().to_uppercase() + "A";
        for wrong in ["", "*", &one.secret()[1..], &upper[..64], &format!("{}0", one.secret())] {
            assert!(!Token::read(wrong).is_some_and(|it| it.is(&one)), "{wrong}");
        }
    }
}

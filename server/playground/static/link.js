// Share links: the settings in the address's fragment, which browsers do not send to servers. A key is never part of them.

const NAME = "run=";

/** The address of this page with settings in it. */
export function linkTo(settings) {
  const bytes = new TextEncoder().encode(JSON.stringify(settings));
  const text = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
  const url = new URL(location.href);
  url.hash = NAME + text.replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
  return url.href;
}

/** The settings in this page's address, or null. */
export function linked() {
  const fragment = location.hash.slice(1);
  if (!fragment.startsWith(NAME)) return null;
  try {
    const text = atob(fragment.slice(NAME.length).replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(text, (character) => character.charCodeAt(0));
    const settings = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
    return typeof settings === "object" ? settings : null;
  } catch {
    return null; // a link that was cut on its way
  }
}

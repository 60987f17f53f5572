// The API key: in this tab's session storage, for both pages, and nowhere else. It is gone when the tab is closed.

const NAME = "collm-api-key";

/** The key that the server took last, or "". */
export function savedKey() {
  return sessionStorage.getItem(NAME) ?? "";
}

/** Keep a key that the server has taken; "" forgets it. */
export function saveKey(key) {
  if (key) sessionStorage.setItem(NAME, key);
  else sessionStorage.removeItem(NAME);
}

/** The header that sends it. */
export function authorization(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

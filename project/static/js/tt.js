// htmx under Trusted Types: HTML of this server's own answers may be parsed, scripts in it never run.
(() => {
  const createHTML = (text) => text;
  const policy = globalThis.trustedTypes?.createPolicy("htmx", { createHTML, createScript: () => "" });
  htmx.registerExtension("tt", { init: (api) => policy && api.initSecurity(policy) });
})();

// A login with Kernel's SDK for Node, with nothing changed but the address:
//
//   npm install @onkernel/sdk
//   SWITCHBOARD_URL=http://127.0.0.1:8000 SWITCHBOARD_KEY=sk_... node tests/examples/node_sdk.mjs 127.0.0.1:9100 http://127.0.0.1:9100/simple/login
//
// It asks the terminal for what the site asks for.
import { createInterface } from "node:readline";
import Kernel from "@onkernel/sdk";

const [domain, loginUrl] = process.argv.slice(2);
const { SWITCHBOARD_URL = "http://127.0.0.1:8000", SWITCHBOARD_KEY } = process.env;
if (!domain || !SWITCHBOARD_KEY) {
  console.error("usage: SWITCHBOARD_KEY=sk_... node node_sdk.mjs DOMAIN [LOGIN_URL]");
  process.exit(2);
}
const { connections } = new Kernel({ baseURL: SWITCHBOARD_URL, apiKey: SWITCHBOARD_KEY }).auth;
const terminal = createInterface({ input: process.stdin });
const lines = terminal[Symbol.asyncIterator]();

const connection = await connections.create({ domain, profile_name: `node-${Date.now()}`, login_url: loginUrl });
const login = await connections.login(connection.id);
console.log("a person can answer here as well:", login.hosted_url);

let answered;
for await (const event of await connections.follow(connection.id)) {
  if (event.event !== "managed_auth_state") continue;
  console.log(event.flow_status, event.flow_step, event.website_error ?? "");
  if (event.flow_step !== "AWAITING_INPUT" || event.interaction_id === answered) continue;
  answered = event.interaction_id;
  const values = {};
  for (const field of event.fields) {
    process.stdout.write(`${field.label}: `);
    values[field.id] = (await lines.next()).value ?? "";
  }
  await connections.submit(connection.id, { interaction_id: answered, field_values: values });
}
terminal.close();
console.log("now:", (await connections.retrieve(connection.id)).status);

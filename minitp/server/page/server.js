// ---- the server ----
const $ = id => document.getElementById(id);
const STATES = { ok: 'ready', loading: 'loading', draining: 'shutting down', failed: 'the model has failed', gone: 'not reachable' };
const POLL_MS = 3000;
let model = null;    // the model's name, once the server has sent it
let running = null;  // the answer that is arriving: { abort, done }

async function api(path, options) {
  const headers = { 'Content-Type': 'application/json' }, key = sessionStorage.getItem('key');
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { headers, ...options }).catch(() => { throw new Error('the server cannot be reached'); });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  const message = body?.error?.message ?? `the server answered ${answer.status} ${answer.statusText}`;
  if (answer.status === 401) askForKey(key ? message : '');
  if (answer.status === 404) model = null;  // the server may have been restarted with another model
  throw new Error(message);
}
async function loadModel() {
  model = (await (await api('v1/models')).json()).data[0].id;
  $('key-form').hidden = true;
  $('model').textContent = model;
  document.title = `${model} · minitp`;
}
async function loadRanks() {
  showRanks(await (await api('ranks')).json());
}
async function checkHealth() {
  const response = fetch('health', { cache: 'no-store', signal: AbortSignal.timeout(2 * POLL_MS) });
  const now = await response.then(answer => answer.json()).then(body => body.status).catch(() => 'gone');
  $('state').className = now === 'ok' ? 'good' : now === 'loading' ? '' : 'bad';
  const words = STATES[now] ?? now;
  if ($('state').textContent !== words) $('state').textContent = words;  // otherwise a screen reader repeats it each time
  if (now === 'gone') model = null;  // the server may return with another model
  else if (!model && $('key-form').hidden) await loadModel().catch(() => {});
  if (now !== 'ok') areRanksKnown = false;  // the ranks may be started again
  else if (model && (running || !areRanksKnown)) await loadRanks().catch(() => {});
}
function askForKey(message) {
  $('key-error').textContent = message;
  $('key-form').hidden = false;
  $('key').focus();
}
$('key-form').addEventListener('submit', event => {
  event.preventDefault();
  sessionStorage.setItem('key', $('key').value.trim());
  $('key').value = '';
  loadModel().then(() => { $('box').focus(); checkHealth(); }, () => {});  // asks again if this key is also wrong
});
async function* events(answer) {  // yields the data of server-sent events
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ''; ;) {
    const { value, done } = await reader.read().catch(() => { throw new Error('the connection was lost'); });
    if (done) throw new Error('the connection closed before the answer was complete');
    const parts = (rest + value).split('\n\n');
    rest = parts.pop();
    yield* parts.map(part => part.replace(/^data: ?/, ''));
  }
}
async function stream(fields, signal, onText) {  // calls onText(piece) for each piece; returns the usage and the finish reason
  const body = JSON.stringify({ ...fields, model, stream: true, stream_options: { include_usage: true } }), end = {};
  for await (const data of events(await api('v1/chat/completions', { method: 'POST', body, signal }))) {
    if (data === '[DONE]') return end;
    const { error, choices, usage } = JSON.parse(data);
    if (error) throw new Error(error.message);
    if (usage) end.usage = usage;
    if (choices[0]?.finish_reason) end.reason = choices[0].finish_reason;
    if (choices[0]?.delta.content) onText(choices[0].delta.content);
  }
}

// ---- the conversation ----
const RANKS_MS = 300;  // time for the ranks to report the times of their last batches to rank 0
let messages = [];     // the conversation, in the form of the API, without the system prompt

async function receive(asked, signal) {  // shows the answer to the messages `asked`; returns whether there is one
  $('hint').hidden = true;
  $('log').querySelectorAll(':scope > .error').forEach(old => old.remove());
  const answer = new Answer(), system = $('system').value.trim();
  goToEnd();
  const drawing = setInterval(() => answer.draw(), DRAW_MS);
  const most = $('most').valueAsNumber || undefined;
  let end, error;
  try {
    if (!model) await loadModel();
    const sent = system ? [{ role: 'system', content: system }, ...asked] : asked;
    const body = { messages: sent, temperature: $('temperature').valueAsNumber, max_tokens: most };
    end = await stream(body, signal, piece => answer.add(piece));
  } catch (failure) { error = failure; }
  clearInterval(drawing);
  answer.finish(end ? answer.summary(end, most) : (signal.aborted ? `stopped${DOT}` : '') + answer.progress());
  const isAnswered = Boolean(end || answer.text);
  if (isAnswered) messages = [...asked, { role: 'assistant', content: answer.text }];
  else answer.article.remove();
  if (!end && !signal.aborted) {
    scrollAlong(() => (answer.text ? answer.article : $('log')).append(h('p', { className: 'error' }, `Error: ${error.message}`)));
    checkHealth();
  }
  setTimeout(() => loadRanks().catch(() => {}), RANKS_MS);
  return isAnswered;
}
async function ask(content, signal) {
  const question = addMessage('user', h('p', { className: 'text', dir: 'auto' }, content));
  if (await receive([...messages, { role: 'user', content }], signal)) return;
  question.remove();  // the text goes back into the box
  $('box').value = [content, $('box').value].filter(Boolean).join('\n');
}
async function regenerate(signal) {  // replaces the last answer, once another one arrives
  const old = [...$('log').querySelectorAll('.assistant')].at(-1);
  old.hidden = true;
  if (await receive(messages.slice(0, -1), signal)) old.remove();
  else old.hidden = false;
}
async function run(work) {  // runs work(signal) unless an answer is arriving
  if (running || !$('form').reportValidity()) return;
  const abort = new AbortController(), done = work(abort.signal);
  setRunning({ abort, done });
  await done.finally(() => setRunning(null));
}
function setRunning(now) {
  running = now;
  $('send').hidden = now !== null;
  $('stop').hidden = now === null;
  $('log').ariaBusy = now !== null;  // a screen reader reads an answer once it is complete
}
$('form').addEventListener('submit', event => {
  event.preventDefault();
  const content = $('box').value;
  if (running || !content.trim()) return;
  $('box').value = '';
  run(signal => ask(content, signal));
  $('box').focus();
});
$('box').addEventListener('keydown', event => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $('form').requestSubmit();
});
$('log').addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.matches('.copy')) return copy(button);
  run(button.matches('.again') ? regenerate : signal => ask(button.textContent, signal));  // or an example of a message
  (matchMedia('(pointer: coarse)').matches ? $('log') : $('box')).focus();  // on a phone, the box would open the keyboard
});
$('stop').addEventListener('click', () => { running?.abort.abort(); $('box').focus(); });
$('new').addEventListener('click', async () => {
  running?.abort.abort();
  await running?.done;
  messages = [];
  $('log').querySelectorAll('article, :scope > .error').forEach(one => one.remove());
  $('hint').hidden = false;
  $('box').focus();
});
$('system').addEventListener('input', () => {
  $('system-summary').textContent = $('system').value.trim() ? 'System prompt (in use)' : 'System prompt';
});
(async function watch() { await checkHealth(); setTimeout(watch, POLL_MS); })();
